"""A checkpoint of DeepSpeed's own -> one of ours, from which a run goes on: weights, moments, counts and position.

Read and written block by block: of no tensor is more in memory than a few of them.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from xlscale.checkpoint.engine_files import OPTIM, ZERO, EngineFiles, names_in, tag_folder
from xlscale.checkpoint.engine_grid import GridFiles
from xlscale.checkpoint.engine_universal import UniversalFiles
from xlscale.checkpoint.hub_names import SECOND_NAMES, Shapes, compare_shapes, hf_names, shapes_of
from xlscale.checkpoint.partition_file import Entry, file_entry
from xlscale.checkpoint.pickles import first_line
from xlscale.checkpoint.reshard import write_partitions
from xlscale.checkpoint.retention import folder_name
from xlscale.checkpoint.store import FORMAT, publish, versions
from xlscale.checkpoint.weights import check_finite
from xlscale.config import load_config, to_toml
from xlscale.config_sections import Config, ModelConfig
from xlscale.data.shards import fsync_path
from xlscale.data.stream import open_stream
from xlscale.data.tokens_derive import Progress
from xlscale.parallel.sharded import FP32, KINDS
from xlscale.parallel.tensor_parallel import VOCABULARY, plan_class, split_dim
from xlscale.training.optimizer import DECAY, group_of

log = logging.getLogger(__name__)


def open_engine_files(source: Path, unsafe: bool = False) -> EngineFiles:
    """The checkpoint in `source`, a tag's folder or the one that `latest` stands in; ValueError when it is not whole.

    unsafe: files that ask for more than tensors and a few known classes are unpickled too, and run their code.
    """
    folder = tag_folder(source)
    universal = (folder / ZERO).is_dir()
    if universal and (grid := [name for name in names_in(folder) if OPTIM.fullmatch(name)]):
        raise ValueError(f"{folder} holds both {grid[0]} and {ZERO}/; move one of the two elsewhere")
    try:
        return UniversalFiles(folder, unsafe) if universal else GridFiles(folder, unsafe)
    except (KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        # A pickle may hold anything at any place.
        what = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{folder} does not hold what the engine writes ({what}); copy it anew") from error


class EngineWeights:
    """Rows of the whole tensors by our names, slices joined by TP_PLAN; names and shapes are those of a config."""

    def __init__(self, files: EngineFiles, model: ModelConfig) -> None:
        self.files, self.shapes = files, shapes_of(model)
        names = {name for slices in files.shapes for name in slices}
        self.names = _names(names, model)
        found: Shapes = {ours: self._joined(ours) for ours in self.names}
        strangers = sorted(names - set(self.names.values()))
        found |= {name: next(slices[name] for slices in files.shapes if name in slices) for name in strangers}
        self._rows = {ours: found[ours][0] for ours in self.names}
        """Rows that stand there, those that fill up a split vocabulary included."""
        wanted = {
            ours: (max(shape[0], found.get(ours, shape)[0]), *shape[1:]) if _is_vocabulary(ours) else shape
            for ours, shape in self.shapes.items()
        }
        compare_shapes(found, wanted, f"of {files.folder}")
        self._check_filling()

    def _joined(self, ours: str) -> tuple[int, ...]:
        """Shape of a whole parameter; no right one where a rank has none of it, or slices are not TP_PLAN's."""
        slices = self._slices(ours)
        dim = split_dim(ours)
        if dim is None or len(slices) == 1:
            return slices[0] if len(set(slices)) == 1 else (0,)
        if any(len(each) <= dim for each in slices):
            return slices[0]
        return (*slices[0][:dim], sum(each[dim] for each in slices), *slices[0][dim + 1 :])

    def _slices(self, ours: str) -> list[tuple[int, ...]]:
        name, shape = self.names[ours], self.shapes[ours]
        slices = [each.get(name, (0,)) for each in self.files.shapes]
        width = prod(shape[1:])
        if name in self.files.shapeless and slices[0][0] % width == 0:
            return [(slices[0][0] // width, *shape[1:])]
        return slices

    def _check_filling(self) -> None:
        """ValueError unless the rows past the vocabulary are the zeros that make it divide."""
        for ours, rows in self._rows.items():
            first = self.shapes[ours][0]
            if rows > first and self._whole(FP32, ours, first, rows).any():
                raise ValueError(
                    f"{self.files.folder}: {self.names[ours]} has {rows} rows, and those past model.vocab_size = "
                    f"{first} are not zero, so they are no padding; set model.vocab_size to the rows of that model"
                )

    def rows(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a whole parameter or moment, fp32, by our name; zeros when there are no moments."""
        if kind != FP32 and not self.files.optimizer_steps:
            return torch.zeros(stop - start, *self.shapes[name][1:])
        found = self._whole(kind, name, start, stop)
        check_finite(f"{self.files.folder}: {kind} of {self.names[name]}", found)
        return found

    def _whole(self, kind: str, ours: str, start: int, stop: int) -> torch.Tensor:
        slices, dim, name = self._slices(ours), split_dim(ours), self.names[ours]
        width = prod(self.shapes[ours][1:])
        if dim == 0:
            parts, low = [], 0
            for tp_rank, (size, *_) in enumerate(slices):
                first, last = max(start, low), min(stop, low + size)
                if first < last:
                    parts.append(self.files.flat(kind, name, tp_rank, (first - low) * width, (last - low) * width))
                low += size
            flat = torch.cat([torch.empty(0), *parts])
        elif dim is None:
            flat, *others = (
                self.files.flat(kind, name, tp_rank, start * width, stop * width) for tp_rank in range(len(slices))
            )
            for tp_rank, other in enumerate(others, start=1):
                if not torch.equal(flat, other):
                    raise ValueError(
                        f"{self.files.folder}: {kind} of {name} differs between tensor-parallel ranks 0 and {tp_rank}, "
                        "which hold it alike; take an earlier checkpoint"
                    )
        else:
            widths = [shape[1] for shape in slices]
            blocks = [
                self.files.flat(kind, name, tp_rank, start * each, stop * each).view(-1, each)
                for tp_rank, each in enumerate(widths)
            ]
            flat = torch.cat(blocks, 1)
        return flat.reshape(stop - start, *self.shapes[ours][1:])


def _is_vocabulary(ours: str) -> bool:
    return plan_class(ours)[0] == VOCABULARY


def _names(found: set[str], model: ModelConfig) -> dict[str, str]:
    """Our name -> the engine's, of those that are there: ours, or transformers'."""
    theirs = hf_names(model)
    for ours, name in theirs.items():
        if name not in found and SECOND_NAMES.get(name) in found:
            theirs[ours] = SECOND_NAMES[name]
    same = {ours: ours for ours in theirs}
    names = max((same, theirs), key=lambda naming: len(found & set(naming.values())))
    return {ours: name for ours, name in names.items() if name in found}


def _tell_groups(weights: EngineWeights, config: Config) -> None:
    """A warning for each hyper-parameter that the engine's groups had otherwise: from here on the config's hold."""
    cfg = config.optimizer
    told: dict[str, list[str]] = {}
    for ours, name in weights.names.items():
        decay = cfg.weight_decay if group_of(ours) == DECAY else 0.0
        for key, now in (("weight_decay", decay), ("betas", tuple(cfg.betas)), ("eps", cfg.eps)):
            before = weights.files.groups.get(name, {}).get(key, now)
            before = tuple(before) if isinstance(before, list) else before
            if before != now:
                told.setdefault(f"{key} was {before} there and is {now} by [optimizer]", []).append(name)
    for line, names in told.items():
        log.warning("%s, of %d parameters, as %s", line, len(names), names[0])


def import_engine(
    source: Path,
    config_path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    dp: int = 0,
    tp: int = 0,
    slot: int | None = None,
    unsafe: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the engine's checkpoint `source` into the folder of checkpoints `out` as one of ours, and return it.

    `config_path`, `overrides`: of the run that is to go on from it. dp, tp: whose partitions to write; 0 = as many as
    the source has files, and as the config says. slot: the samples that the run counts as seen, whole updates of them,
    where they are not the engine's updates times training.global_batch_size; the step goes by it. ValueError, with
    nothing written, for what cannot be read, is of another model, or does not fit.
    """
    config = load_config(config_path, overrides)
    tp = tp or config.parallel.tensor_parallel
    load_config(config_path, [*overrides, f"parallel.tensor_parallel={tp}"])  # what forbids a split forbids the run
    files = open_engine_files(source, unsafe)
    weights = EngineWeights(files, config.model)
    dp = dp or files.dp
    step = _step(config, files, slot)
    final = out.resolve() / folder_name(step)
    if dp < 1:
        raise ValueError(f"dp = {dp} is too small; use 1 or more")
    if final.exists():
        raise ValueError(f"{final} is there, and a checkpoint is never written into; name another folder")
    _tell_groups(weights, config)
    stream = open_stream(config, progress).state_dict(step * config.training.global_batch_size)
    partial = final.with_name(f"{final.name}.partial")
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(weights, config, partial, final, step, stream, dp, tp)
    except OSError as error:
        raise ValueError(f"{final} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("imported step %d of %s, %d parameters, to %s", step, files.folder, len(weights.names), final)
    return final


def _step(config: Config, files: EngineFiles, slot: int | None) -> int:
    batch = config.training.global_batch_size
    if slot is None:
        return files.step
    if slot < 0 or slot % batch:
        raise ValueError(
            f"slot = {slot} must be the first sample of an update, a multiple of training.global_batch_size = {batch}; "
            f"use {max(slot // batch, 0) * batch}"
        )
    return slot // batch


def _write(
    weights: EngineWeights,
    config: Config,
    partial: Path,
    final: Path,
    step: int,
    stream: dict[str, Any],
    dp: int,
    tp: int,
) -> None:
    source = weights.files
    needed, free = 4 * len(KINDS) * sum(map(prod, weights.shapes.values())), shutil.disk_usage(partial).free
    if needed > free:
        raise ValueError(f"{final} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; make room")
    (partial / "config.toml").write_text(to_toml(config), encoding="utf-8")
    (partial / "stream.json").write_text(json.dumps(stream | {"changes": []}, indent=1), encoding="utf-8")
    shutil.copytree(config.data.tokenizer, partial / "tokenizer")
    files: dict[str, Entry] = {}
    for path in sorted(partial.rglob("*")):
        fsync_path(path)
        if path.is_file():
            files[str(path.relative_to(partial))] = file_entry(path)
    parameters = {name: {"shape": list(shape), "split_dim": split_dim(name)} for name, shape in weights.shapes.items()}
    files |= write_partitions(partial, parameters, weights.rows, dp, tp)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "slot": stream["slot"],
        "optimizer_steps": source.optimizer_steps,
        # The engine's own AdamW has updated every adapter in every update.
        "language_steps": dict.fromkeys(config.model.languages, source.optimizer_steps),
        "topology": {"dp": dp, "tp": tp, "zero_stage": config.parallel.zero_stage},
        "versions": versions(),
        "parameters": parameters,
        "files": files,
        "imported_from": {
            "folder": str(source.folder.resolve()),
            "topology": {"dp": source.dp, "tp": source.tp, "zero_stage": source.stage},
            "step": source.step,
            "skipped": source.skipped,
            "deepspeed": source.version,
        },
    }
    publish(partial, final, manifest)
