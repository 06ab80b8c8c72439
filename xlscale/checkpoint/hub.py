"""The Hub folder, written tensor by tensor, so that the model is never all in memory; hub_folder.py reads one.

What transformers 4.56 and 5.x need of a folder is held by tests/conformance.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from xlscale.checkpoint.adapter_file import ADAPTERS, is_ours, write_adapters
from xlscale.checkpoint.card import CARD, is_marked, marked
from xlscale.checkpoint.hub_config import TOKENIZER_CONFIG, TOKENIZER_FILES, TOKENIZERS, hub_config
from xlscale.checkpoint.hub_names import Shapes, compare_shapes, hf_names, shapes_of
from xlscale.checkpoint.tensor_file import DTYPES, WRITER, Pieces, write_tensors
from xlscale.checkpoint.weights import INDEX, SAFETENSORS, open_safetensors
from xlscale.config_sections import ModelConfig
from xlscale.data.shards import fsync_path

CONFIG = "config.json"
MAX_SHARD_SIZE = 5_000_000_000
"""Bytes of tensors in a file, as transformers cuts them."""


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
    adapters: bool = False
    """Whether the adapters of each language also stand in a file of their own, see adapter_file.py."""
    tokens_seen: Mapping[str, int] = field(default_factory=dict)
    """Language -> tokens that its adapters were trained on, for those files, where it is known."""

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
        write_tensors(self.beside / name, self.files[name], self.names, pieces, self.dtype, WRITER)

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
        if self.adapters:  # from the files just written, which were of several processes
            write_adapters(self.beside, self.tokens_seen)
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
    adapters: bool = False,
    tokens_seen: Mapping[str, int] | None = None,
) -> HubWriter:
    """The writer of a folder, arguments as of write_hub_folder; ValueError before anything is written."""
    folder = Path(folder).resolve()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be written; use one of {sorted(DTYPES)}")
    if adapters and not model.languages:
        raise ValueError(f"a model of type {model.model_type} has no adapters to write; leave adapters out")
    names = hf_names(model, head, pooler="pooler.dense.weight" in shapes)
    wanted = shapes_of(model, head, pooler="pooler.dense.weight" in shapes)
    compare_shapes(shapes, wanted, f"for {folder}")
    tokenizer_files = _tokenizer_files(tokenizer_folder, model)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} holds what xlscale did not write; name another folder, or remove it")
    files = _files(wanted, DTYPES[dtype][0].itemsize, max_shard_size)
    return HubWriter(folder, model, head, dtype, names, files, tokenizer_files, adapters, dict(tokens_seen or {}))


def write_hub_folder(
    folder: str | Path,
    model: ModelConfig,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    max_shard_size: int = MAX_SHARD_SIZE,
    head: str = "ForMaskedLM",
    adapters: bool = False,
) -> Path:
    """Write a folder that transformers loads, asking `read` for one parameter at a time by our name.

    shapes: our name -> shape of everything that `read` gives, checked before anything is written.
    tokenizer_folder: its files are copied along. dtype: a key of DTYPES. max_shard_size: bytes of tensors in
    a file; a tensor above it gets a file of its own. head: a key of HEADS. adapters: also a file for each language's.
    Memory: the largest tensor. The folder appears whole or not at all, and never replaces what xlscale did not write.
    ValueError for a tensor that is missing, of another shape or not finite.
    """
    writer = hub_writer(folder, model, shapes, tokenizer_folder, dtype, max_shard_size, head, adapters)
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
    entries -= {entry for entry in entries if _is_adapters(entry)}
    weights = {entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()}
    names = {CONFIG, INDEX, *(name for files in TOKENIZER_FILES.values() for name in files)}
    try:
        others_weights = [file for file in weights if open_safetensors(file).metadata() != WRITER]
    except ValueError:
        return False
    return not others_weights and {entry.name for entry in entries - weights} <= names and bool(weights or not entries)


def _is_adapters(folder: Path) -> bool:
    """Whether a folder holds nothing but adapter files of ours."""
    return folder.name == ADAPTERS and folder.is_dir() and all(map(is_ours, folder.iterdir()))
