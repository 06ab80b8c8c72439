"""The Hub folder, tensor by tensor: written from and read into our parameter names, never all in memory.

What transformers 4.56 and 5.x need of a folder is held by tests/conformance.
"""

import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from xlscale.checkpoint.hub_config import TOKENIZER_CONFIG, TOKENIZER_FILES, TOKENIZERS, hub_config, read_hub_config
from xlscale.config import ModelConfig
from xlscale.models.families import layout, parameter_shapes

Shapes = dict[str, tuple[int, ...]]

# Our module -> theirs; (post-LN, pre-LN) where families differ, None where the family has no such module.
# lm_head.decoder is tied and never written: transformers 5.x un-ties it with only a warning, 4.56 crashes.
HF_NAMES: dict[str, str | tuple[str | None, str | None]] = {
    "encoder.embeddings.word": "roberta.embeddings.word_embeddings",
    "encoder.embeddings.position": "roberta.embeddings.position_embeddings",
    "encoder.embeddings.token_type": "roberta.embeddings.token_type_embeddings",
    "encoder.embeddings.norm": ("roberta.embeddings.LayerNorm", None),
    "encoder.layers.N.attention.query": "roberta.encoder.layer.N.attention.self.query",
    "encoder.layers.N.attention.key": "roberta.encoder.layer.N.attention.self.key",
    "encoder.layers.N.attention.value": "roberta.encoder.layer.N.attention.self.value",
    "encoder.layers.N.attention.output": "roberta.encoder.layer.N.attention.output.dense",
    "encoder.layers.N.attention_norm": (
        "roberta.encoder.layer.N.attention.output.LayerNorm",
        "roberta.encoder.layer.N.attention.self_attn_layer_norm",
    ),
    "encoder.layers.N.mlp.up": "roberta.encoder.layer.N.intermediate.dense",
    "encoder.layers.N.mlp.down": "roberta.encoder.layer.N.output.dense",
    "encoder.layers.N.mlp_norm": (
        "roberta.encoder.layer.N.output.LayerNorm",
        "roberta.encoder.layer.N.LayerNorm",
    ),
    "encoder.final_norm": (None, "roberta.encoder.LayerNorm"),
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.decoder": "lm_head",
}

# What older folders hold besides: one of ours by a second name (must be equal), or no part of a masked LM.
SECOND_NAMES = {
    "roberta.embeddings.word_embeddings.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.decoder.bias",
}
NOT_OURS = {"roberta.embeddings.position_ids", "roberta.pooler.dense.weight", "roberta.pooler.dense.bias"}

# xlscale's name -> (torch's, safetensors', config.json's)
DTYPES = {"fp32": (torch.float32, "F32", "float32"), "bf16": (torch.bfloat16, "BF16", "bfloat16")}
READABLE = {"F32", "BF16", "F16"}
# Metadata of the weights: transformers asks for the first, the second says whose folder it is.
WRITER = {"format": "pt", "writer": "xlscale"}
CHUNK = 1 << 24  # elements handled at a time, so that conversion and checks cost no second tensor
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


def hf_names(model: ModelConfig) -> dict[str, str]:
    """Our name of every parameter -> its name on the Hub."""
    pre_norm = layout(model).pre_norm
    names = {}
    for ours in parameter_shapes(model):
        module, leaf = ours.rsplit(".", 1)
        layer = re.search(r"\.layers\.(\d+)\.", module)
        theirs = HF_NAMES[module.replace(layer[0], ".layers.N.") if layer else module]
        placed = theirs[pre_norm] if isinstance(theirs, tuple) else theirs
        assert placed is not None, f"{ours} has no name in {model.model_type}"
        names[ours] = f"{placed.replace('.N.', f'.{layer[1]}.') if layer else placed}.{leaf}"
    return names


def write_hub_folder(
    folder: str | Path,
    model: ModelConfig,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    tokenizer_folder: str | Path | None = None,
    dtype: str = "fp32",
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Write a folder that transformers loads, asking `read` for one parameter at a time by our name.

    shapes: our name -> shape of everything that `read` gives, checked before anything is written.
    tokenizer_folder: its files are copied along. dtype: "fp32" or "bf16". max_shard_size: bytes of tensors in
    a file; a tensor above it gets a file of its own. Memory: the largest tensor. The folder appears whole or
    not at all, and never replaces what xlscale did not write. ValueError for a tensor that is missing, of
    another shape or not finite.
    """
    folder = Path(folder).resolve()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} cannot be written; use one of {sorted(DTYPES)}")
    _compare_shapes(shapes, parameter_shapes(model), f"for {folder}")
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
        _write_weights(beside, model, read, dtype, max_shard_size)
        _write_json(beside / CONFIG, hub_config(model, DTYPES[dtype][2]))
        for file in tokenizer_files:
            shutil.copyfile(file, beside / file.name)
            _sync(beside / file.name)
        _limit_length(beside / TOKENIZER_CONFIG, model)
        _sync(beside)
        if folder.exists():
            folder.rename(replaced)
        beside.rename(folder)
        _sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_weights(
    folder: Path, model: ModelConfig, read: Callable[[str], Tensor], dtype: str, max_shard_size: int
) -> None:
    """All tensors into as few files as max_shard_size allows, and the index if there are several."""
    itemsize = DTYPES[dtype][0].itemsize
    shards: list[Shapes] = [{}]
    used = total = 0
    for name, shape in parameter_shapes(model).items():
        size = math.prod(shape) * itemsize
        if shards[-1] and used + size > max_shard_size:
            shards.append({})
            used = 0
        shards[-1][name] = shape
        used, total = used + size, total + size

    names, weight_map = hf_names(model), {}
    for i, shard in enumerate(shards, start=1):
        file_name = WEIGHTS if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
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
        _check_finite(name, piece)
        file.write(piece.view(torch.uint8).numpy().data)


def _check_finite(name: str, flat: Tensor) -> None:
    for piece in flat.split(CHUNK):
        finite = torch.isfinite(piece)
        if not finite.all():
            value = piece[~finite][0].item()
            raise ValueError(f"{name} holds {value}; weights must be finite: take an earlier checkpoint")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
        others_weights = [file for file in weights if _open(file).metadata() != WRITER]
    except ValueError:
        return False
    return not others_weights and {entry.name for entry in entries - weights} <= names and bool(weights or not entries)


def read_hub_folder(folder: str | Path) -> tuple[ModelConfig, Shapes, Callable[[str], Tensor]]:
    """Open a masked LM's Hub folder: its config, our name -> shape, and a reader of a parameter by our name.

    Names and shapes are checked here, values when read; tensors are memory-mapped, in the dtype of the file.
    ValueError for a tensor missing, unexpected, of a wrong shape or not finite, for pickles, and for a config
    field that cannot be honoured.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give one with {CONFIG} and {WEIGHTS}")
    model = read_hub_config(folder / CONFIG)
    held = {name: file for file in map(_open, _weight_files(folder)) for name in file.keys()}  # noqa: SIM118

    source = hf_names(model)  # our name -> the tensor that is read for it
    ours_of = {theirs: ours for ours, theirs in source.items()}
    for theirs, second in SECOND_NAMES.items():
        if second in held and theirs not in held:
            source[ours_of[theirs]] = second
        elif second in held and not _equal(held[theirs].get_tensor(theirs), held[second].get_tensor(second)):
            raise ValueError(f"{folder}: {second} differs from {theirs}; only tied weights can be read, tie them first")

    found: Shapes = {
        ours: tuple(held[name].get_slice(name).get_shape()) for ours, name in source.items() if name in held
    }
    strangers = held.keys() - {*source.values(), *SECOND_NAMES.values(), *NOT_OURS}
    _compare_shapes(found | dict.fromkeys(sorted(strangers), ()), parameter_shapes(model), f"in {folder}")
    for name in source.values():
        code = held[name].get_slice(name).get_dtype()
        if code not in READABLE:
            raise ValueError(f"{folder}: {name} has dtype {code}; convert it to one of {sorted(READABLE)}")

    def read(ours: str) -> Tensor:
        tensor: Tensor = held[source[ours]].get_tensor(source[ours])
        _check_finite(f"{folder}: {ours}", tensor.reshape(-1))
        return tensor

    return model, found, read


def _compare_shapes(found: Shapes, wanted: Shapes, where: str) -> None:
    """ValueError with the first few tensors of each kind unless names and shapes are equal on both sides."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    wrong = [f"{name} {tuple(found[name])} for {wanted[name]}" for name in both if tuple(found[name]) != wanted[name]]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"tensors {where} do not fit the config: {'; '.join(problems)}; "
            "use a masked LM's weights and the config they were trained with"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder; ValueError when one of them is not there."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        pickles = [path.name for path in sorted(folder.iterdir()) if path.suffix in {".bin", ".pt", ".pth", ".pkl"}]
        if pickles:
            raise ValueError(
                f"{folder} holds its weights in {pickles[0]}, a pickle, which can run code and is not read; "
                "convert it to safetensors first"
            )
        raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}; give the folder of a masked LM")
    try:
        listed = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is not an index ({error!r}); copy it anew") from None
    absent = [name for name in listed if Path(str(name)).name != name or not (folder / name).is_file()]
    if absent:
        raise ValueError(f"{folder / INDEX} names {absent}, not in the folder; copy all of its files")
    return [folder / name for name in listed]


def _open(file: Path) -> Any:
    """A memory-mapped safetensors file; a damaged one is a ValueError."""
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or not safetensors ({error}); copy it anew") from None


def _equal(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same, compared in pieces."""
    pieces = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=False)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pieces)
