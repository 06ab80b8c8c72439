"""The Hub folder, written tensor by tensor, so that the model is never all in memory; hub_folder.py reads one.

What transformers 4.56 and 5.x need of a folder is held by tests/conformance.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xlscale.checkpoint.card import CARD, is_marked, marked
from xlscale.checkpoint.hub_config import TOKENIZER_CONFIG, TOKENIZER_FILES, TOKENIZERS, hub_config
from xlscale.checkpoint.hub_names import Shapes, compare_shapes, hf_names, shapes_of
from xlscale.checkpoint.weights import CHUNK, INDEX, SAFETENSORS, check_finite, open_safetensors, safetensors_head
from xlscale.config_sections import ModelConfig
from xlscale.data.shards import fsync_path

# xlscale's name -> (torch's, safetensors', config.json's)
DTYPES = {
    "fp32": (torch.float32, "F32", "float32"),
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
    "fp16": (torch.float16, "F16", "float16"),
}
# Metadata of the weights: transformers asks for the first, the second says whose folder it is.
WRITER = {"format": "pt", "writer": "xlscale"}
CONFIG = "config.json"
MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in a file, as transformers cuts them."""

Pieces = Callable[[str], Iterable[Tensor]]
"""Our name -> the rows of that parameter, in order, in as many pieces as one likes."""


@dataclass(frozen=True)
class HubWriter:
    """A Hub folder to be written, all of it checked before; its files may be written by several processes."""

    folder: Path
    model: ModelConfig
    head: str
    """A key of HEADS."""
    dtype: str
    """A key of DTYPES."""
    names: dict[str, str]
    """Our name -> that on the Hub."""
    files: dict[str, Shapes]
    """File of weights -> our name and shape of each of its tensors, in their order."""
    tokenizer_files: list[Path]

    @property
    def beside(self) -> Path:
        """Where it is written before it has its name."""
        return self.folder.with_name(f".{self.folder.name}.writing")

    @property
    def _replaced(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.replaced")

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        itemsize = DTYPES[self.dtype][0].itemsize
        return sum(math.prod(shape) * itemsize for shapes in self.files.values() for shape in shapes.values())

    def begin(self) -> None:
        """Make the folder beside, and clear what killed exports left; by one process, before any writes a file."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self._replaced.exists() and not self.folder.exists():  # an export was killed between its two renames
            self._replaced.rename(self.folder)
        for left_over in (self.beside, self._replaced):
            shutil.rmtree(left_over, ignore_errors=True)
        self.beside.mkdir()

    def write_file(self, name: str, pieces: Pieces) -> None:
        """Write and flush one of `files`; ValueError for a tensor of another shape, or one that is not finite."""
        _write_safetensors(self.beside / name, self.files[name], self.names, pieces, self.dtype)

    def finish(self, card: str = "") -> Path:
        """The small files and the rename, by one process, after all weights are written; card: text of README.md."""
        if len(self.files) > 1:
            weight_map = {self.names[ours]: file for file, shapes in self.files.items() for ours in shapes}
            _write_json(self.beside / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})
        _write_json(self.beside / CONFIG, hub_config(self.model, DTYPES[self.dtype][2], self.head))
        for file in self.tokenizer_files:
            shutil.copyfile(file, self.beside / file.name)
            fsync_path(self.beside / file.name)
        _limit_length(self.beside / TOKENIZER_CONFIG, self.model)
        if card:
            (self.beside / CARD).write_text(marked(card), encoding="utf-8")
            fsync_path(self.beside / CARD)
        fsync_path(self.beside)
        if self.folder.exists():
            self.folder.rename(self._replaced)
        self.beside.rename(self.folder)
        fsync_path(self.folder.parent)
        shutil.rmtree(self._replaced, ignore_errors=True)
        return self.folder

    def abandon(self) -> None:
        """Clear what was written beside; nothing after finish()."""
        shutil.rmtree(self.beside, ignore_errors=True)


def hub_writer(
    folder: str | Path,
    model: ModelConfig,
    shapes: Shapes,
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    max_shard_size: int = MAX_SHARD_SIZE,
    head: str = "ForMaskedLM",
) -> HubWriter:
    """The writer of a folder, arguments as of write_hub_folder; ValueError before anything is written."""
    folder = Path(folder).resolve()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be written; use one of {sorted(DTYPES)}")
    names = hf_names(model, head, pooler="pooler.dense.weight" in shapes)
    wanted = shapes_of(model, head, pooler="pooler.dense.weight" in shapes)
    compare_shapes(shapes, wanted, f"for {folder}")
    tokenizer_files = _tokenizer_files(tokenizer_folder, model)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} holds what xlscale did not write; name another folder, or remove it")
    files = _files(wanted, DTYPES[dtype][0].itemsize, max_shard_size)
    return HubWriter(folder, model, head, dtype, names, files, tokenizer_files)


def write_hub_folder(
    folder: str | Path,
    model: ModelConfig,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    max_shard_size: int = MAX_SHARD_SIZE,
    head: str = "ForMaskedLM",
) -> Path:
    """Write a folder that transformers loads, asking `read` for one parameter at a time by our name.

    shapes: our name -> shape of everything that `read` gives, checked before anything is written.
    tokenizer_folder: its files are copied along. dtype: a key of DTYPES. max_shard_size: bytes of tensors in
    a file; a tensor above it gets a file of its own. head: a key of HEADS. Memory: the largest tensor. The folder
    appears whole or not at all, and never replaces what xlscale did not write. ValueError for a tensor that is
    missing, of another shape or not finite.
    """
    writer = hub_writer(folder, model, shapes, tokenizer_folder, dtype, max_shard_size, head)
    return write_alone(writer, lambda name: (read(name),))


def write_alone(writer: HubWriter, pieces: Pieces, card: str = "") -> Path:
    """All of a folder by this process: whole, or nothing is left of it."""
    writer.begin()
    try:
        for file in writer.files:
            writer.write_file(file, pieces)
        return writer.finish(card)
    finally:
        writer.abandon()


def _files(shapes: Shapes, itemsize: int, max_shard_size: int) -> dict[str, Shapes]:
    """All tensors in as few files as max_shard_size allows."""
    shards: list[Shapes] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used += size
    if len(shards) == 1:
        return {SAFETENSORS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, start=1)}


def _write_safetensors(path: Path, shapes: Shapes, names: dict[str, str], pieces: Pieces, dtype: str) -> None:
    """One file: the length of the header, the header (offsets follow from shapes), each tensor's bytes."""
    target, code, _ = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": WRITER}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * target.itemsize
        header[names[name]] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as file:
        file.write(safetensors_head(header))
        for name, shape in shapes.items():
            # No name holds the tensor here, so it is freed before the next one is read.
            _write_tensor(file, name, shape, pieces(name), target)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(
    file: BinaryIO, name: str, shape: tuple[int, ...], pieces: Iterable[Tensor], target: torch.dtype
) -> None:
    rows = 0
    for rows_of_it in pieces:
        rows += len(rows_of_it)
        if rows > shape[0] or rows_of_it.shape[1:] != shape[1:]:
            raise _wrong_shape(name, (rows, *rows_of_it.shape[1:]), shape)
        flat = rows_of_it.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK].to(device="cpu", dtype=target).contiguous()
            check_finite(name, piece)
            file.write(piece.view(torch.uint8).numpy().data)
    if rows != shape[0]:
        raise _wrong_shape(name, (rows, *shape[1:]), shape)


def _wrong_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"{name} has shape {found}, not {shape}; use the config that it was trained with")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fsync_path(path)


def _limit_length(path: Path, model: ModelConfig) -> None:
    """A tokenizer serves models of several lengths; in a model's folder it says how many tokens this one takes."""
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model_max_length"] = model.max_position_embeddings - model.pad_token_id - 1
        _write_json(path, content)


def _tokenizer_files(folder: str | Path | None, model: ModelConfig) -> list[Path]:
    wanted = TOKENIZER_FILES[TOKENIZERS[model.model_type]]
    files = [] if folder is None else [Path(folder) / name for name in wanted]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing}; a {model.model_type} folder needs {list(wanted)}")
    return files


def _is_ours(folder: Path) -> bool:
    """Whether a folder is empty or all of it was written by write_hub_folder, so that it may be replaced."""
    if not folder.is_dir():
        return False
    entries = {entry for entry in folder.iterdir() if entry.name != CARD or not is_marked(entry)}
    weights = {entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()}
    names = {CONFIG, INDEX, *(name for files in TOKENIZER_FILES.values() for name in files)}
    try:
        others_weights = [file for file in weights if open_safetensors(file).metadata() != WRITER]
    except ValueError:
        return False
    return not others_weights and {entry.name for entry in entries - weights} <= names and bool(weights or not entries)
