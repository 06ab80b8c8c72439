"""A digest of a tensor that its owners make of their own parts, in place: parts add up, nothing is gathered.

Every element becomes a 64-bit number, of its place in the whole tensor and of its bits; the digest is their sum mod
2**64. The mix is one to one, so one wrong element always shows; several go unnoticed once in 2**64. It is no defence
against someone who wants to be unnoticed.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xlscale.checkpoint.weights import open_safetensors
from xlscale.parallel.sharded import FP32, ShardedModel, share
from xlscale.parallel.tensor_parallel import split_dim

BLOCK = 1 << 16
"""Elements mixed at a time: they stay in the cache."""
UNSIGNED = {2: np.uint16, 4: np.uint32}
SIGNED = {2: torch.int16, 4: torch.int32}


def digest(flat: Tensor, first: int = 0, narrow: int = 0, width: int = 0, offset: int = 0) -> int:
    """Digest of a run of elements that begins at place `first`.

    narrow: where the run is of a slice of `narrow` columns of a matrix of `width`, `first` counts in that slice, whose
    first column is `offset`; 0 = the run is of the whole.
    """
    total = 0
    for begin in range(0, flat.numel(), BLOCK):
        part = flat[begin : begin + BLOCK].contiguous()
        size = part.element_size()
        place = np.arange(first + begin, first + begin + part.numel(), dtype=np.uint64)
        if narrow:
            place = place // np.uint64(narrow) * np.uint64(width) + place % np.uint64(narrow) + np.uint64(offset)
        bits = part.view(SIGNED[size]).numpy().view(UNSIGNED[size])
        total += int(_mixed((place << np.uint64(32)) | bits).sum())
    return total % (1 << 64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: every bit depends on every bit, and no two numbers become one."""
    x += np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def live_digest(sharded: ShardedModel, name: str, parameter: object, dtype: torch.dtype) -> int:
    """This rank's part of the digest of a parameter as it is in memory, in `dtype`. Collective below stage 3."""
    topology, shape, dim = sharded.topology, sharded.full_shapes()[name], split_dim(name)
    assert torch.Size(shape).numel() < 1 << 32, f"{name} has more elements than a place has bits"
    values = sharded.read(parameter, FP32)
    if dim is None and topology.tp_rank:  # all tensor-parallel ranks hold it
        return 0
    width = torch.Size(shape[1:]).numel()
    start, _ = sharded.partition(parameter)
    low, high = share(shape[dim or 0], topology.tp_rank, topology.tp)
    total = 0
    for begin in range(0, values.numel(), BLOCK):
        part = values[begin : begin + BLOCK].to(dtype)
        if dim == 1:
            total += digest(part, start + begin, high - low, width, low)
        else:
            total += digest(part, start + begin + (low * width if dim == 0 else 0))
    return total % (1 << 64)


def file_digests(path: Path, names: dict[str, str], rows_at_once: int = 1 << 22) -> dict[str, int]:
    """The digests of a written file's tensors. names: ours -> the file's. At most `rows_at_once` elements in memory."""
    found = {}
    file = open_safetensors(path)
    for ours, theirs in names.items():
        part = file.get_slice(theirs)
        rows, *rest = part.get_shape()
        width = torch.Size(rest).numel()
        step = max(1, rows_at_once // width)
        found[ours] = sum(
            digest(part[start : min(start + step, rows)].reshape(-1), start * width) for start in range(0, rows, step)
        ) % (1 << 64)
    return found
