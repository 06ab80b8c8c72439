"""A checkpoint's partitions cut anew for another shape, ahead of time: read and written block by block."""

import hashlib
import json
import logging
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from xlscale.checkpoint.consolidate import open_checkpoint
from xlscale.checkpoint.store import MANIFEST, Checkpoint, partition_file, publish, versions
from xlscale.checkpoint.weights import safetensors_head
from xlscale.config import load_config
from xlscale.data.shards import fsync_path
from xlscale.parallel.sharded import KINDS, share

log = logging.getLogger(__name__)

BLOCK = 1 << 26
"""Bytes of a parameter that are read at once; two or three copies of them are in memory."""


def reshard(path: Path, out: Path, dp: int, tp: int) -> Path:
    """Write the checkpoint at `path` into the folder `out` as a run of `dp` x `tp` processes would, and return it.

    `path`: as of open_checkpoint. `out`: a folder of checkpoints; what is returned is out/step-<step>. Weights,
    moments, step counts and all else are the same to the bit, only who holds what changes. Memory: a few blocks,
    whatever the size. ValueError when the model cannot be split so, when the folder is there, or when the disk is full.
    """
    checkpoint = open_checkpoint(path)
    final = out.resolve() / f"step-{checkpoint.step:08d}"
    if dp < 1:
        raise ValueError(f"dp = {dp} is too small; use 1 or more")
    # What forbids a split there would forbid the run.
    load_config(checkpoint.folder / "config.toml", [f"parallel.tensor_parallel={tp}"])
    if final.exists():
        raise ValueError(f"{final} is there, and a checkpoint is never written into; name another folder")
    partial = final.with_name(f"{final.name}.partial")
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        _write(checkpoint, partial, final, dp, tp)
    except OSError as error:
        raise ValueError(f"{final} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("resharded step %d of %s to dp %d x tp %d in %s", checkpoint.step, checkpoint.folder, dp, tp, final)
    return final


def _write(checkpoint: Checkpoint, partial: Path, final: Path, dp: int, tp: int) -> None:
    old = checkpoint.manifest
    before = old["topology"]
    partitions = {partition_file(t, d) for t in range(before["tp"]) for d in range(before["dp"])}
    files = {name: entry for name, entry in old["files"].items() if name not in partitions}
    free, needed = shutil.disk_usage(partial).free, sum(entry["bytes"] for entry in old["files"].values())
    if needed > free:
        raise ValueError(f"{final} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; make room")
    for name in files:
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / name, partial / name)
        fsync_path(partial / name)
    written = [
        [_File(partial / partition_file(t, d), _layout(old, t, tp, d, dp)) for d in range(dp)] for t in range(tp)
    ]
    for name in old["parameters"]:
        for kind in KINDS:
            _cut(checkpoint, kind, name, written)
    files |= {file.path.name: file.close() for row in written for file in row}
    manifest = {key: value for key, value in old.items() if key != "seal"}
    manifest |= {"topology": before | {"dp": dp, "tp": tp}, "versions": versions(), "files": files}
    manifest["resharded_from"] = {"topology": before, "seal": old["seal"], "versions": old["versions"]}
    assert not (partial / MANIFEST).exists()
    publish(partial, final, manifest)


def _slice_shape(entry: dict[str, Any], tp_rank: int, tp: int) -> list[int]:
    """Shape of a tensor-parallel rank's slice of a parameter."""
    shape, dim = list(entry["shape"]), entry["split_dim"]
    if dim is not None:
        start, stop = share(shape[dim], tp_rank, tp)
        shape[dim] = stop - start
    return shape


def _layout(manifest: dict[str, Any], tp_rank: int, tp: int, dp_rank: int, dp: int) -> dict[str, tuple[int, int]]:
    """Name -> start and stop of one rank's partition in its flat slice."""
    return {
        name: share(prod(_slice_shape(entry, tp_rank, tp)), dp_rank, dp)
        for name, entry in manifest["parameters"].items()
    }


class _File:
    """One rank's partitions, written from front to back: parameter by parameter, and of each kind by kind."""

    def __init__(self, path: Path, ranges: dict[str, tuple[int, int]]) -> None:
        self.path, self.ranges = path, ranges
        self._digest = hashlib.sha256()
        starts = {name: start for name, (start, _) in ranges.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "starts": json.dumps(starts)}}
        end = 0
        for name, (start, stop) in ranges.items():
            for kind in KINDS:
                begin, end = end, end + 4 * (stop - start)
                header[f"{kind}/{name}"] = {"dtype": "F32", "shape": [stop - start], "data_offsets": [begin, end]}
        head = safetensors_head(header)
        self._append(head)
        self._bytes = self._written = len(head)
        self._bytes += end

    def take(self, name: str, start: int, flat: torch.Tensor) -> None:
        """Write what of `flat`, elements of the slice from `start` on, is this rank's."""
        first, last = self.ranges[name]
        low, high = max(start, first), min(start + len(flat), last)
        if low < high:
            self._append(flat[low - start : high - start].numpy().data)
            self._written += 4 * (high - low)

    def close(self) -> dict[str, Any]:
        """Flush it; what the manifest says of it."""
        assert self._written == self._bytes == self.path.stat().st_size, self.path
        fsync_path(self.path)
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def _append(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        # Opened each time: of a grid of thousands no process may have all files open.
        with self.path.open("ab", buffering=0) as file:
            view = memoryview(data).cast("B")
            while view:
                view = view[file.write(view) :]


def _cut(checkpoint: Checkpoint, kind: str, name: str, written: list[list[_File]]) -> None:
    """Read one parameter, block by block, and give each rank its part."""
    entry, tp = checkpoint.manifest["parameters"][name], len(written)
    shape, dim = entry["shape"], entry["split_dim"]
    step = max(1, BLOCK // (4 * prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = checkpoint.rows(kind, name, start, stop)
        for tp_rank, files in enumerate(written):
            part, row = block, start
            if dim is not None:
                low, high = share(shape[dim], tp_rank, tp)
                if dim == 0:
                    row = max(start, low) - low
                    part = block[max(start, low) - start : max(start, low, min(stop, high)) - start]
                else:
                    part = block[:, low:high]
            flat = part.reshape(-1)
            for file in files:
                file.take(name, row * prod(part.shape[1:]), flat)
