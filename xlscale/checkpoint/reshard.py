"""A checkpoint's partitions cut anew for another shape, ahead of time: read and written block by block."""

import logging
import shutil
from math import prod
from pathlib import Path
from typing import Any

from xlscale.checkpoint.consolidate import open_checkpoint
from xlscale.checkpoint.partition_file import Entry, PartitionFile, partition_file
from xlscale.checkpoint.store import MANIFEST, Checkpoint, publish, versions
from xlscale.config import load_config
from xlscale.data.shards import fsync_path
from xlscale.parallel.sharded import KINDS, Rows, share

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
    files |= write_partitions(partial, old["parameters"], checkpoint.rows, dp, tp)
    manifest = {key: value for key, value in old.items() if key != "seal"}
    manifest |= {"topology": before | {"dp": dp, "tp": tp}, "versions": versions(), "files": files}
    manifest["resharded_from"] = {"topology": before, "seal": old["seal"], "versions": old["versions"]}
    assert not (partial / MANIFEST).exists()
    publish(partial, final, manifest)


def write_partitions(folder: Path, parameters: dict[str, Any], rows: Rows, dp: int, tp: int) -> dict[str, Entry]:
    """Write the files of all ranks of dp x tp, and what a manifest says of each.

    `parameters`: as in a manifest. `rows`: where they come from, in blocks; kind by kind, name by name.
    """
    ranks = [[(t, d) for d in range(dp)] for t in range(tp)]
    written = [
        [PartitionFile(folder / partition_file(t, d), _layout(parameters, t, tp, d, dp)) for t, d in row]
        for row in ranks
    ]
    for kind in KINDS:
        for name, entry in parameters.items():
            _cut(rows, kind, name, entry, written)
    return {file.path.name: file.close() for row in written for file in row}


def _slice_shape(entry: dict[str, Any], tp_rank: int, tp: int) -> list[int]:
    """Shape of a tensor-parallel rank's slice of a parameter."""
    shape, dim = list(entry["shape"]), entry["split_dim"]
    if dim is not None:
        start, stop = share(shape[dim], tp_rank, tp)
        shape[dim] = stop - start
    return shape


def _layout(parameters: dict[str, Any], tp_rank: int, tp: int, dp_rank: int, dp: int) -> dict[str, tuple[int, int]]:
    """Name -> start and stop of one rank's partition in its flat slice."""
    return {name: share(prod(_slice_shape(entry, tp_rank, tp)), dp_rank, dp) for name, entry in parameters.items()}


def _cut(rows: Rows, kind: str, name: str, entry: dict[str, Any], written: list[list[PartitionFile]]) -> None:
    """Read one parameter, block by block, and give each rank its part."""
    shape, dim, tp = entry["shape"], entry["split_dim"], len(written)
    step = max(1, BLOCK // (4 * prod(shape[1:])))
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        block = rows(kind, name, start, stop)
        for tp_rank, files in enumerate(written):
            part, row = block, start
            if dim is not None:
                low, high = share(shape[dim], tp_rank, tp)
                if dim == 0:
                    row = max(start, low) - low
                    part = block[max(start, low) - start : max(start, low, min(stop, high)) - start]
                else:
                    part = block[:, low:high]
            flat, begin = part.reshape(-1), row * prod(part.shape[1:])
            for file in files:
                # What of `flat`, elements of the slice from `begin` on, is this rank's.
                first, last = file.ranges[name]
                low, high = max(begin, first), min(begin + len(flat), last)
                if low < high:
                    file.write(flat[low - begin : high - begin])
