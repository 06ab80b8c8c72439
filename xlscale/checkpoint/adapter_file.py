"""The adapters of one language by themselves: where they lie, and the file in which they are exchanged.

`adapters/de_DE.safetensors` holds transformers' names below `output.adapter_modules.de_DE.`, as layer.0.dense1.weight.
Its metadata are strings, those in braces JSON:

    language      de_DE
    flags         {"hidden_size": 768, ...}, the fields FLAGS of trunk.py
    base          {"fp32": sha256, "bf16": ...}: digests of the encoder's layers and final norm, of no adapter
    embeddings    {...} of all embeddings and their norm
    head          {...} of the language model's head, {} where the model had none
    digest        {...} of the file's own tensors
    tokens_seen   tokens of this language that the adapters were trained on, or unknown
    format, writer
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from xlscale.checkpoint.head_names import PREFIX
from xlscale.checkpoint.hub_folder import CONFIG, HubFolder, open_hub_folder, with_changes
from xlscale.checkpoint.hub_names import Shapes, compare_shapes, hf_names, shapes_of
from xlscale.checkpoint.tensor_file import DTYPES, WRITER, write_tensors
from xlscale.checkpoint.trunk import (
    FLAGS,
    KNOWN,
    PARTS,
    PIECE,
    Digests,
    Trunk,
    digests,
    folder_trunk,
    precision,
)
from xlscale.checkpoint.weights import READABLE, WeightsFile, check_finite, open_safetensors
from xlscale.config_sections import ModelConfig
from xlscale.config_values import fits
from xlscale.data.shards import fsync_path

ADAPTERS = "adapters"
"""The folder of these files beside a model's weights."""
UNKNOWN = "unknown"
TEXTS = ("language", "tokens_seen")
TABLES = ("flags", "base", "embeddings", "head", "digest")

Rows = Callable[[str, int, int], Tensor]
"""Name as in an adapter file -> rows of that tensor along dimension 0."""


@dataclass(frozen=True)
class LanguageAdapters:
    """The adapters of one language in all layers, wherever they lie; they are read when they are asked for."""

    where: str
    dtype: torch.dtype
    shapes: Shapes
    """By the names of an adapter file."""
    rows: Rows
    tokens_seen: int | None = None
    """None = nobody knows."""

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of one tensor, a few at a time."""
        rows, *rest = self.shapes[name]
        step = max(1, PIECE // torch.Size(rest).numel())
        for start in range(0, rows, step):
            yield self.rows(name, start, min(start + step, rows))

    def read(self, name: str) -> Tensor:
        """A whole tensor."""
        return self.rows(name, 0, self.shapes[name][0])

    def digests(self, formats: tuple[str, ...]) -> Digests:
        """Digests in several number formats, each of which the values must be given in."""
        return digests(((name, self.shapes[name], self.pieces(name)) for name in sorted(self.shapes)), formats)


@dataclass(frozen=True)
class AdapterSource:
    """An adapter file, or a Hub folder with adapters, and what they were made on."""

    trunk: Trunk
    languages: dict[str, LanguageAdapters]
    folder: HubFolder | None = None
    state: Sequence[tuple[Path, int, int]] = ()
    """Path, time of change in ns and bytes of the folder's files when it was opened."""


def adapter_names(model: ModelConfig, language: str) -> dict[str, str]:
    """Our name of every parameter of a language's adapters -> its name in an adapter file."""
    one = replace(model, languages=[language], default_language="")
    below = f"output.adapter_modules.{language}."
    return {
        ours: theirs.removeprefix(f"{PREFIX}encoder.").replace(below, "")
        for ours, theirs in hf_names(one).items()
        if ".adapters." in ours
    }


def adapter_shapes(model: ModelConfig, language: str) -> Shapes:
    """Shapes by the names of an adapter file."""
    shapes = shapes_of(replace(model, languages=[language], default_language=""))
    return {theirs: shapes[ours] for ours, theirs in adapter_names(model, language).items()}


def folder_adapters(opened: HubFolder, language: str) -> LanguageAdapters:
    """The adapters of a language in an open Hub folder, which has them."""
    ours = {theirs: name for name, theirs in adapter_names(opened.model, language).items()}
    beside = (opened.where if opened.where.is_dir() else opened.where.parent) / ADAPTERS / f"{language}.safetensors"
    seen = _tokens(beside, _metadata(beside)) if beside.is_file() else None
    return LanguageAdapters(
        f"{language} of {opened.where}",
        opened.dtype,
        adapter_shapes(opened.model, language),
        lambda name, start, stop: opened.rows(ours[name], start, stop),
        seen,
    )


def write_adapters(folder: Path, tokens_seen: Mapping[str, int]) -> None:
    """Write the adapter file of every language beside the weights of a Hub folder that is whole.

    tokens_seen: of each language, where it is known.
    """
    opened = open_hub_folder(folder)
    trunk = folder_trunk(opened)
    (folder / ADAPTERS).mkdir()
    for language in opened.model.languages:
        adapters = replace(folder_adapters(opened, language), tokens_seen=tokens_seen.get(language))
        write_adapter_file(folder / ADAPTERS, language, adapters, trunk, precision(opened.dtype))
    fsync_path(folder / ADAPTERS)


def write_adapter_file(folder: Path, language: str, adapters: LanguageAdapters, trunk: Trunk, dtype: str) -> Path:
    """Write `folder`/<language>.safetensors, whole or not at all, in a number format (a key of DTYPES).

    ValueError for values that are not finite, and for a file of that name that xlscale did not write.
    """
    path = folder / f"{language}.safetensors"
    check_ours(path)
    rounded = replace(
        adapters,
        dtype=DTYPES[dtype][0],
        rows=lambda name, start, stop: adapters.rows(name, start, stop).to(DTYPES[dtype][0]),
    )
    tables = {
        "flags": trunk.flags,
        "digest": rounded.digests(KNOWN[dtype]),
        **{part: trunk.digests(part) for part in PARTS},
    }
    seen = UNKNOWN if adapters.tokens_seen is None else str(adapters.tokens_seen)
    metadata = WRITER | {"language": language, "tokens_seen": seen}
    metadata |= {name: json.dumps(table) for name, table in tables.items()}
    beside = folder / f".{path.name}.writing"
    try:
        write_tensors(beside, rounded.shapes, {name: name for name in rounded.shapes}, rounded.pieces, dtype, metadata)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    fsync_path(folder)
    return path


def check_ours(path: Path) -> None:
    """ValueError for a file of others where one of ours is to be written."""
    if path.exists() and not is_ours(path):
        raise ValueError(f"{path} is not xlscale's; name another folder, or remove it")


def is_ours(path: Path) -> bool:
    """Whether a file is an adapter file that xlscale wrote, so that it may be replaced."""
    try:
        metadata = _metadata(path) if path.is_file() else {}
    except ValueError:
        return False
    return WRITER.items() <= metadata.items() and {*TEXTS, *TABLES} <= metadata.keys()


def open_adapters(source: Path, before: AdapterSource | None = None) -> AdapterSource:
    """Open an adapter file or a Hub folder; ValueError in one line for whatever is wrong with it.

    before: what was opened earlier; where it is the same folder, unchanged, its trunk is not digested again.
    """
    is_file = source.suffix == ".safetensors" and source.is_file()
    if is_file and ("language" in _metadata(source) or not (source.parent / CONFIG).is_file()):
        return read_adapter_file(source)
    opened = open_hub_folder(source)
    stats = [(file.path, file.path.stat()) for file in opened.weights.files]
    state = [(path, stat.st_mtime_ns, stat.st_size) for path, stat in stats]
    if before is not None and before.state == state:
        return before
    adapters = {language: folder_adapters(opened, language) for language in opened.model.languages}
    return AdapterSource(folder_trunk(opened), adapters, opened, state)


def read_adapter_file(path: Path) -> AdapterSource:
    """Open an adapter file and check all of it; ValueError in one line for whatever is wrong with it."""
    if path.suffix != ".safetensors" or not path.is_file():
        raise ValueError(f"{path} is no file of adapters; give one as {ADAPTERS}/de_DE.safetensors")
    file, metadata = WeightsFile(path), _metadata(path)
    if missing := [name for name in (*TEXTS, *TABLES) if name not in metadata]:
        raise ValueError(
            f"{path} is no file of adapters: its metadata lack {', '.join(missing)}; "
            "write one with xlscale extend FOLDER --extract DIR"
        )
    tables = {name: _table(path, name, metadata[name]) for name in TABLES}
    if any(tables[part] and tables[part].keys() != tables["base"].keys() for part in PARTS):
        raise ValueError(f"{path}: its metadata tell parts of the trunk in different formats; write the file anew")
    model = _model(path, metadata["language"], tables["flags"])
    if model.num_hidden_layers > len(file.shapes):  # before hostile metadata make as many names
        raise ValueError(f"{path} has {len(file.shapes)} tensors, too few for {model.num_hidden_layers} layers")
    compare_shapes(file.shapes, adapter_shapes(model, metadata["language"]), f"in {path}")
    kinds = sorted(set(file.dtypes.values()))
    if len(kinds) > 1 or kinds[0] not in READABLE:
        raise ValueError(f"{path} holds {' and '.join(kinds)}; adapters are all of one of {', '.join(READABLE)}")

    def rows(name: str, start: int, stop: int) -> Tensor:
        found = file.rows(name, start, stop)
        check_finite(f"{path}: {name}", found)
        return found

    dtype, seen = READABLE[kinds[0]], _tokens(path, metadata)
    adapters = LanguageAdapters(str(path), dtype, dict(file.shapes), rows, seen)
    own = precision(dtype)
    if adapters.digests((own,)) != {own: tables["digest"].get(own)}:
        raise ValueError(f"{path} is damaged: its values are not those of its digest; copy it anew")
    trunk = Trunk.told(tables["flags"], {part: tables[part] for part in PARTS})
    return AdapterSource(trunk, {metadata["language"]: adapters})


def _metadata(path: Path) -> dict[str, str]:
    return open_safetensors(path).metadata() or {}


def _tokens(path: Path, metadata: Mapping[str, str]) -> int | None:
    found = metadata.get("tokens_seen", UNKNOWN)
    if found != UNKNOWN and not re.fullmatch(r"\d{1,18}", found):
        raise ValueError(f"{path}: tokens_seen={found!r} must be a number or {UNKNOWN}; write the file anew")
    return None if found == UNKNOWN else int(found)


def _table(path: Path, name: str, text: str) -> dict[str, Any]:
    """A table of the metadata, its digests checked for their form."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    well = isinstance(found, dict) and (name == "flags" or all(_is_digest(*item) for item in found.items()))
    if not well or not (found or name == "head"):
        raise ValueError(f"{path}: {name} in its metadata is no table of what it says; write the file anew")
    assert isinstance(found, dict)
    return found


def _is_digest(kind: str, value: Any) -> bool:
    return kind in DTYPES and isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _model(path: Path, language: str, flags: dict[str, Any]) -> ModelConfig:
    """A model that has such adapters, for names and shapes; ValueError for flags that none can have."""
    hints = get_type_hints(ModelConfig)
    wrong = [name for name in FLAGS if name not in flags or not fits(flags[name], hints[name])]
    wrong += [name for name in flags if name not in FLAGS]
    if wrong:
        raise ValueError(f"{path}: flags are not those of adapters ({', '.join(wrong)}); write the file anew")
    some = ModelConfig(
        model_type="xmod", vocab_size=8, hidden_size=2, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    try:
        return with_changes(some, {**flags, "languages": [language]})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
