"""Whether what all tensor-parallel ranks hold alike still is alike: a digest of each rank's share, compared.

Nothing ever synchronises a replicated parameter over the tensor-parallel ranks: it stays the same only because every
rank computes the same. A rank that once computed something else trains a model of its own from there on, in silence.
"""

import torch
import torch.distributed as dist

from xlscale.parallel.sharded import KINDS, ShardedModel
from xlscale.parallel.tensor_parallel import split_dim

_CHUNK = 1 << 22
"""Elements digested at once: their 64-bit weights and products are made beside them, 100 MiB."""
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def drifted(sharded: ShardedModel) -> list[str]:
    """Names of replicated parameters of which tensor-parallel ranks hold different values, the same on all ranks.

    Compared to the bit: fp32 weight, both moments and the copy that the forward pass uses, in all partitions. A
    collective over all ranks, in the order of named_parameters.
    """
    topology = sharded.topology
    if topology.tp == 1:
        return []
    names, digests = [], []
    for name, parameter in sharded.named_parameters():
        if split_dim(name) is None:
            names.append(name)
            digests += [digest(values).to(topology.device) for values in _held(sharded, parameter)]
    mine = torch.stack(digests)
    theirs = [torch.empty_like(mine) for _ in range(topology.tp)]
    dist.all_gather(theirs, mine, group=topology.tp_group)
    differs = torch.stack([other != mine for other in theirs]).any(0).view(len(names), -1).any(1).int()
    # Each data-parallel rank has seen its own partitions only.
    dist.all_reduce(differs, op=dist.ReduceOp.MAX)
    return [name for name, found in zip(names, differs.tolist(), strict=True) if found]


def _held(sharded: ShardedModel, parameter: torch.nn.Parameter) -> list[torch.Tensor]:
    """All that this rank holds of a parameter, flat, the same number of tensors for each parameter."""
    start, stop = sharded.partition(parameter)
    # Stage 3 keeps a partition of the working copy, padded at its end, and only some parameters whole; below it they
    # are whole on all ranks.
    kept = parameter.ds_tensor[: stop - start] if hasattr(parameter, "ds_tensor") else parameter.data[:0]
    return [*(sharded.read(parameter, kind) for kind in KINDS), kept, parameter.data]


def digest(values: torch.Tensor) -> torch.Tensor:
    """64 bits, int64, of a tensor's bits and their places, computed where it is.

    The sum of the elements' bit patterns, each times an odd factor that belongs to its place, modulo 2^64: one changed
    element always shows, several cancel by a chance of 2^-32 at most (fp32 values that differ in their signs only).
    Integer sums do not depend on their order.
    """
    flat = values.detach().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for first in range(0, bits.numel(), _CHUNK):
        part = bits[first : first + _CHUNK].long()
        factor = torch.arange(first + 1, first + 1 + part.numel(), device=flat.device)
        # splitmix64's mixing; the products wrap around
        factor.mul_(-7046029254386353131)
        factor.bitwise_xor_(factor >> 30).mul_(-4658895280553007687)
        factor.bitwise_xor_(factor >> 27).mul_(-7723592293110705685)
        factor.bitwise_or_(1)
        # + 1: a zero counts too, so that a tensor that has lost its end differs
        total += (part.add_(1)).mul_(factor).sum()
    return total
