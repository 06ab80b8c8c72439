"""Files of named tensors as others write them: safetensors and torch's pickles, of one file or of several.

Nothing in them is trusted, nor run where --unsafe-pickle does not say so, and no more of them is in memory than what
is being read.
"""

import json
import struct
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlscale.checkpoint.pickles import first_line, read_pickle

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
FAIRSEQ = "model.pt"
# As safetensors calls what can be read; the same names serve for pickles.
READABLE = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CHUNK = 1 << 24  # elements handled at a time, so that conversion and checks cost no second tensor
MAPPED = 1 << 30
"""Bytes read of a mapped file before it is mapped anew, so that its pages do not count as our memory for long."""


class WeightsFile:
    """One memory-mapped file. ValueError for a damaged one, and for a pickle of more than tensors and plain values.

    unsafe: such a pickle is read all the same, and runs whatever code it holds.
    """

    def __init__(self, path: Path, unsafe: bool = False):
        self.path, self.unsafe = path, unsafe
        self._read = 0
        self._open = _open_safetensors if path.suffix == ".safetensors" else _open_pickle
        self._tensors, self.extra = self._open(path, unsafe)
        """extra: what stands in fairseq's file beside the tensors."""
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for name, found in self._tensors.items():
            mapped = isinstance(found, Tensor)
            self.shapes[name] = tuple(found.shape if mapped else found.get_shape())
            code = found.dtype if mapped else found.get_dtype()
            self.dtypes[name] = next((key for key, dtype in READABLE.items() if dtype == code), str(code))

    @property
    def is_mapped(self) -> bool:
        """Whether it is read from the disk piece by piece; pickles of torch below 1.6 are wholly in memory."""
        return self.path.suffix == ".safetensors" or zipfile.is_zipfile(self.path)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor along dimension 0, a view of the mapped file."""
        width = torch.Size(self.shapes[name][1:]).numel() * READABLE[self.dtypes[name]].itemsize
        self._read += (stop - start) * width
        if self._read > MAPPED and self.is_mapped and not self.unsafe:  # code that it holds runs once
            self._tensors, self.extra = self._open(self.path, False)
            self._read = (stop - start) * width
        found: Tensor = self._tensors[name][start:stop]
        return found


@dataclass(frozen=True)
class Weights:
    """The tensors of all files of a model by name."""

    where: Path
    """The folder or file that was given."""
    files: list[WeightsFile]
    held: dict[str, WeightsFile] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for file in self.files:
            for name in file.shapes:
                if name in self.held:
                    raise ValueError(
                        f"{file.path} and {self.held[name].path.name} both hold {name}; remove one of them"
                    )
                self.held[name] = file

    @property
    def fairseq(self) -> dict[str, Any] | None:
        """What stands in a fairseq file beside the tensors; None for all other files."""
        return self.files[0].extra

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that is there."""
        return self.held[name].shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor; ValueError for one that weights do not have."""
        code = self.held[name].dtypes[name]
        if code not in READABLE:
            raise ValueError(f"{self.where}: {name} has dtype {code}; convert it to one of {sorted(READABLE)}")
        return READABLE[code]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor along dimension 0, in the file's dtype; only they are read."""
        return self.held[name].rows(name, start, stop)


def open_weights(where: Path, unsafe: bool = False) -> Weights:
    """The weights of a folder, or of one file of it; ValueError when there are none, or not all, or damaged ones.

    unsafe: as of WeightsFile.
    """
    if where.is_file():
        return Weights(where, [WeightsFile(where, unsafe)])
    for name, index in ((SAFETENSORS, INDEX), (PICKLE, PICKLE_INDEX), (FAIRSEQ, "")):
        if (where / name).is_file():
            return Weights(where, [WeightsFile(where / name, unsafe)])
        if index and (where / index).is_file():
            return Weights(where, [WeightsFile(where / file, unsafe) for file in _listed(where / index)])
    known = (SAFETENSORS, INDEX, PICKLE, PICKLE_INDEX, FAIRSEQ)
    raise ValueError(f"{where} has none of {', '.join(known)}; give the folder of a model")


def _listed(index: Path) -> list[str]:
    """The files that an index names, all of them beside it."""
    try:
        listed = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is not an index ({first_line(error)}); copy it anew") from None
    absent = [name for name in listed if Path(str(name)).name != name or not (index.parent / name).is_file()]
    if absent or not listed:
        raise ValueError(f"{index} names {absent}, not in the folder; copy all of its files")
    return listed


def open_safetensors(path: Path) -> Any:
    """A memory-mapped safetensors file; a damaged one is a ValueError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged or not safetensors ({first_line(error)}); copy it anew") from None


def _open_safetensors(path: Path, _: bool) -> tuple[dict[str, Any], None]:
    file = open_safetensors(path)
    return {name: file.get_slice(name) for name in file.keys()}, None  # noqa: SIM118


def _open_pickle(path: Path, unsafe: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The tensors of a pickle, and of fairseq's what stands beside them."""
    # An argparse.Namespace holds fairseq's settings; it is filled with values and runs nothing.
    content = read_pickle(path, [Namespace], unsafe)
    extra = None
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        extra = {key: value for key, value in content.items() if key in ("args", "cfg")}
        content = content["model"]
    tensors = dict(content) if isinstance(content, Mapping) else {}
    wrong = [name for name, value in tensors.items() if not isinstance(name, str) or not _is_plain(value)]
    if wrong or not tensors:
        what = f"{str(wrong[0])[:80]!r} is not a plain tensor" if wrong else "it holds no named tensors"
        raise ValueError(f"{path} is a pickle, but not of a model's weights: {what}; use the model's own file")
    return {name: value.detach() for name, value in tensors.items()}, extra


def _is_plain(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"


def safetensors_head(header: dict[str, Any]) -> bytes:
    """What stands before the tensors of a safetensors file: the length of the header, and the header."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def check_finite(name: str, tensor: Tensor) -> None:
    """ValueError, with `name` and the value, for a tensor that holds NaN or an infinity."""
    for piece in tensor.reshape(-1).split(CHUNK):
        finite = torch.isfinite(piece)
        if not finite.all():
            value = piece[~finite][0].item()
            raise ValueError(f"{name} holds {value}; weights must be finite: take an earlier checkpoint")
