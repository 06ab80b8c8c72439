"""The file of one rank's partitions: safetensors whose bytes depend on what it holds and on nothing else.

    head                  offsets, and where in its slice each partition begins
    fp32/<name> ...       then exp_avg/<name> ..., then exp_avg_sq/<name> ...: flat, fp32

Every part, and every other file of a checkpoint as a whole, has a digest of its own, XXH3 of 128 bits: who wants the
weights alone need not read the moments to trust them. It finds what a disk or a cable does; it is no defence against
someone who wants to be unnoticed.
"""

import json
from pathlib import Path
from typing import Any

import torch
import xxhash

from xlscale.checkpoint.weights import safetensors_head
from xlscale.data.shards import fsync_path
from xlscale.parallel.sharded import KINDS

HEAD, WHOLE = "head", "whole"
"""Parts that are no kind: what stands before the tensors, and all of any other file."""
READ = 1 << 22
"""Bytes read at a time for a digest."""

Entry = dict[str, Any]
"""What a manifest says of a file: {"bytes": size, "parts": {part: [start, stop, digest]}}, in bytes."""


def partition_file(tp_rank: int, dp_rank: int) -> str:
    """Name of the file of one rank's partitions."""
    return f"partitions-tp{tp_rank:02d}-dp{dp_rank:04d}.safetensors"


class PartitionFile:
    """A file being written from front to back, its digests made on the way.

    `ranges`: name -> start and stop of the partition in the flat slice, the same names in the same order for all ranks.
    Open only while bytes are written: a grid of thousands of files can be written side by side.
    """

    def __init__(self, path: Path, ranges: dict[str, tuple[int, int]]) -> None:
        self.path, self.ranges = path, ranges
        starts = {name: start for name, (start, _) in ranges.items()}
        header: dict[str, Any] = {"__metadata__": {"starts": json.dumps(starts)}}
        size, end = 4 * sum(stop - start for start, stop in ranges.values()), 0
        for kind in KINDS:
            for name, (start, stop) in ranges.items():
                begin, end = end, end + 4 * (stop - start)
                header[f"{kind}/{name}"] = {"dtype": "F32", "shape": [stop - start], "data_offsets": [begin, end]}
        head = safetensors_head(header)
        self._parts: dict[str, list[Any]] = {HEAD: [0, len(head)]}
        for number, kind in enumerate(KINDS):
            self._parts[kind] = [len(head) + number * size, len(head) + (number + 1) * size]
        self._left = list(self._parts)
        self._written, self._digest = 0, xxhash.xxh3_128()
        self._append(memoryview(head))
        self._close_parts()

    def write(self, flat: torch.Tensor) -> None:
        """Append fp32 values; kind by kind of KINDS, and of each name by name, in any pieces."""
        if flat.numel():  # an empty memoryview cannot be cast
            self._append(flat.detach().contiguous().numpy().data.cast("B"))
            self._close_parts()

    def close(self) -> Entry:
        """Flush it; what the manifest says of it."""
        assert not self._left, (self.path, self._left)
        fsync_path(self.path)
        return {"bytes": self._written, "parts": self._parts}

    def _append(self, data: memoryview) -> None:
        assert self._left, f"{self.path} is full"
        assert self._written + len(data) <= self._parts[self._left[0]][1], (self.path, self._left)
        self._digest.update(data)
        with self.path.open("ab", buffering=0) as file:
            while data:
                written = file.write(data)
                self._written += written
                data = data[written:]

    def _close_parts(self) -> None:
        """Note the digest of the part that is complete, and of those that are empty."""
        while self._left and self._written == self._parts[self._left[0]][1]:
            self._parts[self._left.pop(0)].append(self._digest.hexdigest())
            self._digest = xxhash.xxh3_128()


def file_entry(path: Path) -> Entry:
    """What a manifest says of a file that is none of partitions."""
    size = path.stat().st_size
    return {"bytes": size, "parts": {WHOLE: [0, size, part_digest(path, 0, size)]}}


def part_digest(path: Path, start: int, stop: int) -> str:
    """XXH3 (128 bits, hexadecimal) of the bytes of a file from `start` to `stop`."""
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(min(READ, stop - start)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < stop:
            read = file.readinto(buffer[: stop - start])
            if not read:
                break
            digest.update(buffer[:read])
            start += read
    return digest.hexdigest()
