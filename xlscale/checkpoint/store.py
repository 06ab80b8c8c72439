"""A checkpoint is a folder that is complete or does not count: each rank writes its partitions, any shape reads them.

    step-00000100/
      manifest.json                         step, slot, topology, every parameter's full shape, a digest of every file
      config.toml  stream.json              the resolved config; the stream's position and fingerprints
      faults.json                           the skipped updates, and the losses that a spike is measured by
      data_faults.json                      the samples replaced so far, by shard and cause
      means.json                            means of metrics since the checkpoint before, by which the best are kept
      probe.safetensors                     the logits of a few fixed inputs, to be found again after loading
      tokenizer/                            as on the Hub, so that an export needs nothing else
      partitions-tp00-dp0000.safetensors    flat fp32 weight and moments of that rank, by parameter name

It is written beside under another name, flushed, renamed, and only then pointed to by the link `latest`.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from xlscale.checkpoint.retention import folder_name, point_at, remove_leftovers, retain
from xlscale.checkpoint.states import read_state, write_state
from xlscale.config import ConfigError, to_toml
from xlscale.config_sections import Config
from xlscale.data.shards import disk_is_full, file_sha256, fsync_path
from xlscale.parallel.sharded import KINDS, ShardedModel, share
from xlscale.parallel.tensor_parallel import split_dim
from xlscale.parallel.topology import gather_problems

log = logging.getLogger(__name__)

FORMAT = 1
MANIFEST = "manifest.json"


def _seal(manifest: dict[str, Any]) -> str:
    """Digest of a manifest, over everything but the digest itself."""
    body = {key: value for key, value in manifest.items() if key != "seal"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of what a checkpoint's bytes depend on."""
    return {package: version(package) for package in ("xlscale", "torch", "deepspeed", "fairscale", "safetensors")}


def partition_file(tp_rank: int, dp_rank: int) -> str:
    """Name of the file of one rank's partitions."""
    return f"partitions-tp{tp_rank:02d}-dp{dp_rank:04d}.safetensors"


class DiskFullError(Exception):
    """No room for a checkpoint: nothing is left of it, all older ones are, and all ranks know."""


Problem = tuple[bool, str]
"""Whether a full disk is all that is wrong, and the line."""


def _problem(path: Path, error: Exception) -> Problem:
    return disk_is_full(error), f"checkpoint {path}: {error}"


def _settle(problems: list[Problem], partial: Path, is_main: bool) -> None:
    """Nothing, or on all ranks DiskFullError when no rank has another problem than that, else ConfigError."""
    found = gather_problems(problems)
    lines = [line for _, line in found]
    if not all(full for full, _ in found):
        raise ConfigError(lines)
    if found:
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise DiskFullError("; ".join(lines))


def save(
    root: Path, sharded: ShardedModel, config: Config, step: int, slot: int, states: dict[str, dict[str, Any]]
) -> Path:
    """Write `root/step-<step>` from all ranks and return it; raises DiskFullError or ConfigError on all ranks alike.

    `slot`: the first slot of the next update. `states`: what else must go on, each a file of its own.
    Older folders that [checkpoint] does not keep are removed afterwards.
    """
    topology = sharded.topology
    final = root / folder_name(step)
    partial = root / f"{final.name}.partial"
    problems: list[Problem] = []
    if topology.is_main:
        try:
            remove_leftovers(root)
            partial.mkdir(parents=True)
        except OSError as error:
            problems.append(_problem(partial, error))
    _settle(problems, partial, topology.is_main)
    mine = partition_file(topology.tp_rank, topology.dp_rank)
    entry: dict[str, Any] = {}
    try:
        starts, tensors = {}, {}
        for name, parameter in sharded.named_parameters():
            starts[name] = sharded.partition(parameter)[0]
            for kind in KINDS:
                tensors[f"{kind}/{name}"] = sharded.read(parameter, kind).contiguous()
        save_file(tensors, partial / mine, metadata={"format": "pt", "starts": json.dumps(starts)})
        fsync_path(partial / mine)
        entry = {"bytes": (partial / mine).stat().st_size, "sha256": file_sha256(partial / mine)}
    except (OSError, SafetensorError) as error:
        problems.append(_problem(partial / mine, error))
    _settle(problems, partial, topology.is_main)
    entries: list[tuple[str, dict[str, Any]]] = [("", {})] * topology.world_size
    dist.all_gather_object(entries, (mine, entry))
    if topology.is_main:
        try:
            _finish(partial, final, sharded, config, step, slot, states, dict(entries))
            _tidy_up(final, config)
        except OSError as error:
            problems.append(_problem(partial, error))
    _settle(problems, partial, topology.is_main)
    return final


def _finish(
    partial: Path,
    final: Path,
    sharded: ShardedModel,
    config: Config,
    step: int,
    slot: int,
    states: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
) -> None:
    """The main rank's part of a save: the small files, the manifest, the rename."""
    (partial / "config.toml").write_text(to_toml(config), encoding="utf-8")
    for name, state in states.items():
        write_state(partial, name, state)
    shutil.copytree(config.data.tokenizer, partial / "tokenizer")
    for path in sorted(partial.rglob("*")):
        name = str(path.relative_to(partial))
        if path.is_dir():
            fsync_path(path)
        elif name not in files:
            fsync_path(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "slot": slot,
        "optimizer_steps": sharded.optimizer_steps,
        "topology": {
            "dp": sharded.topology.dp,
            "tp": sharded.topology.tp,
            "zero_stage": config.parallel.zero_stage,
        },
        "versions": versions(),
        "parameters": {
            name: {"shape": list(shape), "split_dim": split_dim(name)} for name, shape in sharded.full_shapes().items()
        },
        "files": files,
    }
    publish(partial, final, manifest)


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Seal the manifest of `partial`, whose other files are flushed, rename it to `final`, and point to that."""
    manifest["seal"] = _seal(manifest)
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    fsync_path(partial / MANIFEST)
    fsync_path(partial)
    if final.exists():  # the same step was saved before, and the run has gone on from an earlier one
        final.rename(final.with_suffix(".removed"))
    partial.rename(final)
    fsync_path(final.parent)


def _tidy_up(final: Path, config: Config) -> None:
    """Point to the new checkpoint and remove those that do not stay; it counts, be there room for that or not."""
    try:
        point_at(final)
        retain(final.parent, config.checkpoint)
    except OSError as error:
        if not disk_is_full(error):
            raise
        log.warning("%s is saved, but there is no room to point to it or to remove older ones: %s", final, error)


class OtherFormatError(ValueError):
    """A whole checkpoint that this version cannot read."""


@dataclass
class Checkpoint:
    """A whole checkpoint, read memory-mapped: any rows of any parameter, whatever topology wrote it."""

    folder: Path
    manifest: dict[str, Any]
    _pieces: dict[tuple[str, int], list[tuple[int, int, Any]]] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open a folder whose manifest is whole and whose files have their sizes; ValueError says what is not."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is not a whole checkpoint: {MANIFEST}: {error}; use another step") from None
        if not isinstance(manifest, dict) or manifest.get("seal") != _seal(manifest):
            raise ValueError(f"{folder} is not a whole checkpoint: {MANIFEST} was changed after it was written")
        if manifest["format"] != FORMAT:
            raise OtherFormatError(
                f"{folder} has format {manifest['format']}, this version of xlscale reads {FORMAT}; use the one that "
                f"wrote it, {manifest['versions']['xlscale']}"
            )
        for name, entry in manifest["files"].items():
            path = folder / name
            size = path.stat().st_size if path.is_file() else None
            if size != entry["bytes"]:
                raise ValueError(f"{path} has {size} bytes, its manifest says {entry['bytes']}; use another step")
        return cls(folder, manifest)

    @property
    def step(self) -> int:
        """Updates done when it was written."""
        return int(self.manifest["step"])

    def state(self, name: str) -> dict[str, Any]:
        """One of the `states` that it was saved with; empty when it was saved without."""
        return read_state(self.folder, name, self.manifest["files"])

    def damaged(self, names: Iterable[str]) -> list[str]:
        """Which of the files do not have the digest that the manifest gives."""
        files = self.manifest["files"]
        return [str(self.folder / name) for name in names if file_sha256(self.folder / name) != files[name]["sha256"]]

    def full(self, name: str, kind: str = KINDS[0]) -> torch.Tensor:
        """A whole parameter (or moment), fp32."""
        return self.rows(kind, name, 0, self.manifest["parameters"][name]["shape"][0])

    def rows(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` along dimension 0 of the whole parameter, fp32; only their bytes are read."""
        shape: list[int] = self.manifest["parameters"][name]["shape"]
        dim = self.manifest["parameters"][name]["split_dim"]
        tp = self.manifest["topology"]["tp"]
        width = 1
        for size in shape[1:]:
            width *= size
        if dim is None:
            flat = self._flat(kind, name, 0, start * width, stop * width)
        elif dim == 0:
            parts = []
            for tp_rank in range(tp):
                low, high = share(shape[0], tp_rank, tp)
                first, last = max(start, low) - low, min(stop, high) - low
                parts.append(self._flat(kind, name, tp_rank, first * width, last * width))
            flat = torch.cat(parts)
        else:
            narrow = width // tp
            blocks = [
                self._flat(kind, name, rank, start * narrow, stop * narrow).view(-1, narrow) for rank in range(tp)
            ]
            flat = torch.cat(blocks, 1)
        return flat.reshape(stop - start, *shape[1:])

    def _flat(self, kind: str, name: str, tp_rank: int, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of one tensor-parallel slice, put together from its partitions."""
        parts = [torch.empty(0)]
        for first, size, file in self._partitions(name, tp_rank):
            low, high = max(start, first), min(stop, first + size)
            if low < high:
                parts.append(file.get_slice(f"{kind}/{name}")[low - first : high - first])
        return torch.cat(parts)

    def _partitions(self, name: str, tp_rank: int) -> list[tuple[int, int, Any]]:
        """(first element, elements, open file) of every partition of one slice."""
        if not self._pieces:
            for rank in range(self.manifest["topology"]["tp"]):
                for dp_rank in range(self.manifest["topology"]["dp"]):
                    file = safe_open(str(self.folder / partition_file(rank, dp_rank)), framework="pt")
                    for parameter, first in json.loads(file.metadata()["starts"]).items():
                        size = file.get_slice(f"{KINDS[0]}/{parameter}").get_shape()[0]
                        self._pieces.setdefault((parameter, rank), []).append((first, size, file))
        return self._pieces[name, tp_rank]
