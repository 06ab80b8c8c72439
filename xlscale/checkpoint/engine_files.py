"""DeepSpeed's own checkpoints, read without it: what every tensor-parallel rank's slice of each parameter holds.

    global_step100/                                     the grid: a file or two of each rank (engine_grid.py)
    global_step100_universal/                           what ds_to_universal makes of it (engine_universal.py)
    latest  latest_universal                            beside them: the name of the newest

The engine matches files by glob and takes what it finds. Here every file must be of one run, one step and one rank.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch

from xlscale.checkpoint.pickles import read_pickle

LATEST, LATEST_UNIVERSAL = "latest", "latest_universal"
ZERO = "zero"
"""Folder of the universal layout's tensors."""
OPTIM = re.compile(r"(?P<precision>bf16_|fp16_|)zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<tp>\d+)_optim_states\.pt")
MODEL = re.compile(r"(?:zero_pp_rank_(?P<dp>\d+)_)?mp_rank_(?P<tp>\d+)_model_states\.pt")


class _Plain:
    """Stands for a class of the engine: takes its values, has none of its code."""


ALLOWED = [
    (_Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]
"""All that the engine's files ask for beside tensors and plain values."""


@dataclass
class EngineFiles(ABC):
    """An open checkpoint of the engine: names, shapes and counts are known, values are read when asked for."""

    folder: Path
    unsafe: bool
    dp: int = 1
    tp: int = 1
    stage: int = 0
    """0 = not told."""
    step: int = 0
    """Updates done, those skipped included."""
    skipped: int = 0
    optimizer_steps: int = 0
    """Updates that AdamW has applied; 0 = there are no moments."""
    version: str = ""
    """deepspeed's."""
    shapes: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    """Of each tensor-parallel rank: name -> shape of its slice."""
    shapeless: set[str] = field(default_factory=set)
    """Parameters of which the files tell the number of elements only; their shape here is that."""
    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name -> the hyper-parameters of its group in the optimizer, where the files tell."""

    @abstractmethod
    def flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of one slice, fp32."""

    def read(self, path: Path, checked: bool = False) -> Any:
        """What torch.save wrote; ValueError for anything else. checked: its bytes were looked at before."""
        if not is_zipfile(path):
            raise ValueError(f"{path} is cut, or not of torch.save; copy it anew")
        if not checked:
            try:
                with ZipFile(path) as archive:
                    bad = archive.testzip()
            except (BadZipFile, OSError, EOFError, NotImplementedError) as error:
                raise ValueError(f"{path} is damaged ({error}); copy it anew") from None
            if bad:
                raise ValueError(f"{path} is damaged ({bad} in it has another checksum); copy it anew")
        return read_pickle(path, ALLOWED, self.unsafe)

    def read_dict(self, path: Path, checked: bool = False) -> dict[str, Any]:
        """As read, of a file that holds a dict."""
        content = self.read(path, checked)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, the engine writes a dict there; copy it anew")
        return content

    def take_counts(self, models: Mapping[Path, dict[str, Any]]) -> None:
        """Step and version, in all files of model states alike."""
        for path, model in models.items():
            check_integers(path, model, ("global_steps", "skipped_steps"))
        check_alike("global_steps", {path: model["global_steps"] for path, model in models.items()})
        model = next(iter(models.values()))
        self.step, self.skipped = model["global_steps"], model["skipped_steps"]
        self.version = str(model.get("ds_version", ""))

    def take_optimizer_steps(self, steps: Mapping[Path, Any]) -> None:
        """AdamW's count, in all files alike."""
        counts = {path: int(step) for path, step in steps.items()}
        check_alike("the optimizer's step", counts)
        self.optimizer_steps = next(iter(counts.values()), 0)


def tag_folder(source: Path) -> Path:
    """The folder of a checkpoint: `source`, or the one in it that `latest` names."""
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder; give the one that save_checkpoint wrote into, or a tag's in it")
    if (source / ZERO).is_dir() or any(OPTIM.fullmatch(name) or MODEL.fullmatch(name) for name in names_in(source)):
        return source
    tags = {
        name: (source / name).read_text(encoding="utf-8", errors="replace").strip()
        for name in (LATEST, LATEST_UNIVERSAL)
        if (source / name).is_file()
    }
    if not tags:
        raise ValueError(f"{source} has no checkpoint of the engine and no file `{LATEST}`; give a tag's folder")
    if len(tags) > 1:
        listed = " and ".join(f"{name} ({tag[:80]!r})" for name, tag in tags.items())
        raise ValueError(f"{source} has {listed}; give the folder of the one that you mean")
    ((name, tag),) = tags.items()
    if Path(tag).name != tag or not (source / tag).is_dir():
        raise ValueError(
            f"{source / name} names {tag[:80]!r}, no folder beside it; copy that too, or give a tag's folder"
        )
    return source / tag


def names_in(folder: Path) -> list[str]:
    """Names of all that is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def more(names: list[str]) -> str:
    """How many there are beside the first."""
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def check_integers(path: Path, content: Mapping[str, Any], keys: Iterable[str]) -> None:
    """ValueError for a key that is not a number."""
    wrong = [key for key in keys if not isinstance(content.get(key), int)]
    if wrong:
        raise ValueError(f"{path} has no number {wrong[0]}, which the engine writes there; copy it anew")


def check_alike(what: str, found: Mapping[Path, Any]) -> None:
    """ValueError when two files do not tell the same."""
    for (first, one), (second, other) in pairwise(found.items()):
        if one != other:
            raise ValueError(
                f"{what} is {one} in {first} and {other} in {second.name}: they are not of one checkpoint; remove what "
                "another run left, or take another tag"
            )
