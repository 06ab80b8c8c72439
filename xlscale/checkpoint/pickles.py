"""torch's pickles, the one place where they are read: nothing in them is run, unless a person says that it may."""

import logging
import re
import warnings
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

log = logging.getLogger(__name__)

Allowed = Sequence[Any]
"""What a pickle may ask for beside tensors and plain values: classes, or (class, the name that stands for it)."""


def read_pickle(path: Path, allowed: Allowed = (), unsafe: bool = False) -> Any:
    """What torch.save wrote, on the CPU, memory-mapped where it is a zip; ValueError, in one line, when it is not read.

    unsafe: what asks for more than `allowed` is unpickled all the same, and runs whatever code it holds.
    """
    mapped = zipfile.is_zipfile(path)
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # whatever a parser of foreign bytes can fail with
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        if asked:
            why = f"is a pickle that asks for {asked[1]}, and may run code; it was not run"
        elif isinstance(error, UnpicklingError):  # torch's own words are to read it without care
            why = "is damaged, or a pickle of more than tensors, which may run code; it was not run"
        else:
            raise ValueError(f"{path} is a pickle that cannot be read ({first_line(error)}); copy it anew") from None
        if not unsafe:
            way = "use safetensors, save the tensors of a file that you trust anew, or import it with --unsafe-pickle"
            raise ValueError(f"{path} {why}: {way}") from None
    asks = f"asks for {asked[1]}" if asked else "is more than tensors and plain values"
    log.warning("%s %s: unpickled without limits, as --unsafe-pickle says; its code runs", path, asks)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
    except Exception as error:
        raise ValueError(f"{path} is a pickle that cannot be read ({first_line(error)}); copy it anew") from None


def first_line(error: Exception) -> str:
    """The first words of an error for a line of ours, or its kind where it has none."""
    lines: Iterable[str] = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:200]
