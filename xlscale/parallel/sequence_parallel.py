"""Sequence parallelism: between the split layers each tensor-parallel rank holds its share of the tokens only.

What is column-split reads all tokens: they are gathered before it, and what is row-split scatters its sum. The gathered
tokens are not kept for the backward pass, which gathers them again (Korthikanti et al. 2022, arXiv:2205.05198).

Legend: B batch, T tokens, t this rank's tokens, D hidden, O outputs (of this rank).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from xlscale.parallel.topology import Topology

Exchange = Callable[[Tensor, Topology], Tensor]


def _share(tokens: int, tp: int) -> int:
    if tokens % tp:
        raise ValueError(
            f"{tokens} tokens are not a multiple of parallel.tensor_parallel={tp}, which "
            f"parallel.sequence_parallel=true needs; pad them to {tokens + -tokens % tp}, or set it to false"
        )
    return tokens // tp


def _gather(local_BtD: Tensor, topology: Topology) -> Tensor:
    """All tokens [B, T, D]."""
    parts = local_BtD.new_empty((topology.tp, *local_BtD.shape))
    dist.all_gather_into_tensor(parts.flatten(0, 1), local_BtD.contiguous(), group=topology.tp_group)
    return parts.transpose(0, 1).flatten(1, 2)


def _reduce_scatter(whole_BTD: Tensor, topology: Topology) -> Tensor:
    """This rank's tokens of the sum of all ranks' `whole` [B, t, D]."""
    B, T = whole_BTD.shape[:2]
    by_rank = whole_BTD.reshape(B, topology.tp, _share(T, topology.tp), *whole_BTD.shape[2:])
    parts = by_rank.transpose(0, 1).contiguous()
    local_BtD = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(local_BtD, parts.flatten(0, 1), group=topology.tp_group)
    return local_BtD


def _cut(whole_BT: Tensor, topology: Topology) -> Tensor:
    tokens = _share(whole_BT.shape[1], topology.tp)
    return whole_BT.narrow(1, topology.tp_rank * tokens, tokens).contiguous()


class _Exchange(torch.autograd.Function):
    """One of the three exchanges above, and the one that its gradient goes through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange, topology: Topology) -> Tensor:
        ctx.back, ctx.topology = back, topology
        return there(x, topology)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grad, ctx.topology), None, None, None


def reduce_scatter_tokens(whole_BTD: Tensor, topology: Topology) -> Tensor:
    """From each rank's addend [B, T, D] to this rank's tokens of the sum; ValueError where tp does not divide T."""
    return _Exchange.apply(whole_BTD, _reduce_scatter, _gather, topology)


def cut_tokens(whole: Tensor, topology: Topology) -> Tensor:
    """This rank's tokens of [B, T, ...], the same on all ranks; ValueError where tp does not divide T."""
    return _Exchange.apply(whole, _cut, _gather, topology) if whole.is_floating_point() else _cut(whole, topology)


def whole_tokens(local_BtD: Tensor, topology: Topology) -> Tensor:
    """All tokens, for what every rank computes alike: the gradient is then whole, and each rank takes its tokens'."""
    return _Exchange.apply(local_BtD, _gather, _cut, topology)


class _Again:
    """Gathers the tokens once more, in the backward pass, for all columns that read them; the last one frees them."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self.readers = self.left = 0
        self.whole_BTD: Tensor | None = None

    def read(self, local_BtD: Tensor) -> Tensor:
        if self.whole_BTD is None:
            self.whole_BTD, self.left = _gather(local_BtD, self.topology), self.readers
        whole_BTD = self.whole_BTD
        self.left -= 1
        if self.left == 0:
            self.whole_BTD = None
        return whole_BTD


class Gathered(NamedTuple):
    """What columns() reads. Columns keep `local`, never `whole`."""

    whole_BTD: Tensor
    local_BtD: Tensor
    again: _Again


def into_columns(local_BtD: Tensor, topology: Topology) -> Gathered:
    """All tokens, once for all columns that read them; backward, the sum of the ranks' gradients, scattered."""
    return Gathered(
        _Exchange.apply(local_BtD, _gather, _reduce_scatter, topology), local_BtD.detach(), _Again(topology)
    )


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole_BTD: Tensor, local_BtD: Tensor, again: _Again, weight: Tensor, bias: Tensor) -> Tensor:
        # The weight is kept as the parameter that it is. ZeRO-3 empties it after this layer and fills it before its
        # backward; a view, such as its transpose, would hold what was gathered until then.
        if ctx.needs_input_grad[3]:
            ctx.save_for_backward(weight, local_BtD)
            again.readers += 1
        else:
            ctx.save_for_backward(weight)
        ctx.again = again
        return F.linear(whole_BTD, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_BTO: Tensor) -> tuple[Tensor | None, ...]:
        weight, *kept = ctx.saved_tensors
        grad_whole_BTD = grad_BTO @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad_BTO.flatten(0, 1).T @ ctx.again.read(*kept).flatten(0, 1) if kept else None
        grad_bias = grad_BTO.sum((0, 1)) if ctx.needs_input_grad[4] else None
        return grad_whole_BTD, None, None, grad_weight, grad_bias


def columns(entered: Gathered, weight: Tensor, bias: Tensor) -> Tensor:
    """Product of all tokens with this rank's rows of a weight [B, T, O]."""
    return _Columns.apply(*entered, weight, bias)
