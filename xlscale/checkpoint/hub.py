"""The Hub folder, written tensor by tensor, so that the model is never all in memory; hub_folder.py reads one.

What transformers 4.56 and 5.x need of a folder is held by tests/conformance.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xlscale.checkpoint.hub_config import TOKENIZER_CONFIG, TOKENIZER_FILES, TOKENIZERS, hub_config
from xlscale.checkpoint.hub_names import Shapes, compare_shapes, hf_names, shapes_of
from xlscale.checkpoint.weights import CHUNK, INDEX, SAFETENSORS, check_finite, open_safetensors
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


def write_hub_folder(
    folder: str | Path,
    model: ModelConfig,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    max_shard_size: int = 5_000_000_000,
    head: str = "ForMaskedLM",
) -> Path:
    """Write a folder that transformers loads, asking `read` for one parameter at a time by our name.

    shapes: our name -> shape of everything that `read` gives, checked before anything is written.
    tokenizer_folder: its files are copied along. dtype: a key of DTYPES. max_shard_size: bytes of tensors in
    a file; a tensor above it gets a file of its own. head: a key of HEADS. Memory: the largest tensor. The folder
    appears whole or not at all, and never replaces what xlscale did not write. ValueError for a tensor that is
    missing, of another shape or not finite.
    """
    folder = Path(folder).resolve()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be written; use one of {sorted(DTYPES)}")
    names = hf_names(model, head, pooler="pooler.dense.weight" in shapes)
    wanted = shapes_of(model, head, pooler="pooler.dense.weight" in shapes)
    compare_shapes(shapes, wanted, f"for {folder}")
    tokenizer_files = _tokenizer_files(tokenizer_folder, model)
    if folder.exists() and not _is_ours(folder):
        raise ValueError(f"{folder} holds what xlscale did not write; name another folder, or remove it")

    folder.parent.mkdir(parents=True, exist_ok=True)
    beside, replaced = (folder.with_name(f".{folder.name}.{state}") for state in ("writing", "replaced"))
    if replaced.exists() and not folder.exists():  # an export was killed between its two renames
        replaced.rename(folder)
    for left_over in (beside, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    beside.mkdir()
    try:
        _write_weights(beside, wanted, names, read, dtype, max_shard_size)
        _write_json(beside / CONFIG, hub_config(model, DTYPES[dtype][2], head))
        for file in tokenizer_files:
            shutil.copyfile(file, beside / file.name)
            fsync_path(beside / file.name)
        _limit_length(beside / TOKENIZER_CONFIG, model)
        fsync_path(beside)
        if folder.exists():
            folder.rename(replaced)
        beside.rename(folder)
        fsync_path(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_weights(
    folder: Path,
    shapes: Shapes,
    names: dict[str, str],
    read: Callable[[str], Tensor],
    dtype: str,
    max_shard_size: int,
) -> None:
    """All tensors into as few files as max_shard_size allows, and the index if there are several."""
    itemsize = DTYPES[dtype][0].itemsize
    shards: list[Shapes] = [{}]
    used = total = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used, total = used + size, total + size

    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file_name = SAFETENSORS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(folder / file_name, shard, names, read, dtype)
        weight_map.update(dict.fromkeys((names[name] for name in shard), file_name))
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_safetensors(
    path: Path, shapes: Shapes, names: dict[str, str], read: Callable[[str], Tensor], dtype: str
) -> None:
    """One file: the length of the header, the header (offsets follow from shapes), each tensor's bytes."""
    target, code, _ = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": WRITER}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * target.itemsize
        header[names[name]] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shapes.items():
            # No name holds the tensor here, so it is freed before the next one is read.
            _write_tensor(file, name, shape, read(name), target)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, name: str, shape: tuple[int, ...], tensor: Tensor, target: torch.dtype) -> None:
    if tuple(tensor.shape) != shape:
        found = tuple(tensor.shape)
        raise ValueError(f"{name} has shape {found}, not {shape}; use the config that it was trained with")
    flat = tensor.detach().reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to(device="cpu", dtype=target).contiguous()
        check_finite(name, piece)
        file.write(piece.view(torch.uint8).numpy().data)


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
    entries = set(folder.iterdir())
    weights = {entry for entry in entries if entry.suffix == ".safetensors" and entry.is_file()}
    names = {CONFIG, INDEX, *(name for files in TOKENIZER_FILES.values() for name in files)}
    try:
        others_weights = [file for file in weights if open_safetensors(file).metadata() != WRITER]
    except ValueError:
        return False
    return not others_weights and {entry.name for entry in entries - weights} <= names and bool(weights or not entries)
