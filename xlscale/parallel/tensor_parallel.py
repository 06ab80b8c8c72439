"""Tensor parallelism as a table: TP_PLAN says how each parameter is split; what splits, merges and classifies reads it.

M masked positions, D hidden, V vocabulary; a capital V_tp is this rank's share of the vocabulary.
"""

from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.layers import ColumnParallelLinear, RowParallelLinear
from fairscale.nn.model_parallel.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
)
from torch import nn

from xlscale.models.dropout import DropoutKey, KeyedDropout
from xlscale.models.parts import Parts, VocabProjection
from xlscale.parallel.topology import Topology

COLUMN, ROW, VOCABULARY, REPLICATED = "column", "row", "vocabulary", "replicated"

TP_PLAN = {
    "attention.query": COLUMN,
    "attention.key": COLUMN,
    "attention.value": COLUMN,
    "attention.output": ROW,
    "mlp.up": COLUMN,
    "mlp.down": ROW,
    "cross_attention.query": COLUMN,
    "cross_attention.key": COLUMN,
    "cross_attention.value": COLUMN,
    "cross_attention.output": ROW,
    "adapters.*.down": COLUMN,
    "adapters.*.up": ROW,
    "embeddings.word": VOCABULARY,
    "head.decoder": VOCABULARY,
    "embeddings.position": REPLICATED,
    "embeddings.token_type": REPLICATED,
    "embeddings.norm": REPLICATED,
    "attention_norm": REPLICATED,
    "attention.distance": REPLICATED,
    "cross_attention_norm": REPLICATED,
    "mlp_norm": REPLICATED,
    "adapter_norm": REPLICATED,
    "final_norm": REPLICATED,
    "head.dense": REPLICATED,
    "head.norm": REPLICATED,
    "pooler.dense": REPLICATED,
    "classifier.dense": REPLICATED,
    "classifier.output": REPLICATED,
    "classifier": REPLICATED,
    "qa_outputs": REPLICATED,
}
"""Module path, without numbers and leading parts -> how its weight and bias lie over the tensor-parallel ranks.

A * stands for one name, that of a language.
"""

SPLIT_DIM = {
    (COLUMN, "weight"): 0,
    (COLUMN, "bias"): 0,
    (ROW, "weight"): 1,
    (ROW, "bias"): None,
    (VOCABULARY, "weight"): 0,
    (VOCABULARY, "bias"): 0,
    (REPLICATED, "weight"): None,
    (REPLICATED, "bias"): None,
}


def split_dim(name: str) -> int | None:
    """Dimension along which the parameter is cut, None when every tensor-parallel rank holds all of it.

    Raises ValueError for a parameter that TP_PLAN does not know: guessing would train it wrongly in silence.
    """
    module, _, kind = name.rpartition(".")
    for suffix, style in TP_PLAN.items():
        if fnmatchcase(f".{module}", f"*.{suffix}"):
            return SPLIT_DIM[style, kind]
    raise ValueError(
        f"parameter {name} is in no class of TP_PLAN; add its module there (xlscale/parallel/tensor_parallel.py)"
    )


def tensor_slice(full: torch.Tensor, name: str, tp_rank: int, tp: int) -> torch.Tensor:
    """The part of a full parameter that belongs to one tensor-parallel rank (a view)."""
    dim = split_dim(name)
    return full if dim is None else full.chunk(tp, dim)[tp_rank]


def merge_slices(slices: list[torch.Tensor], name: str) -> torch.Tensor:
    """The full parameter from the parts of all tensor-parallel ranks, in rank order; inverse of tensor_slice."""
    dim = split_dim(name)
    return slices[0] if dim is None else torch.cat(slices, dim)


def full_shape(local: torch.Size | tuple[int, ...], name: str, tp: int) -> tuple[int, ...]:
    """Shape of the whole parameter, from the shape of one rank's part."""
    dim = split_dim(name)
    return tuple(size * tp if index == dim else size for index, size in enumerate(local))


def mark_split_parameters(model: nn.Module) -> None:
    """Tell DeepSpeed which parameters are parts of larger ones; without it the gradient norm is wrong."""
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = split_dim(name) is not None  # type: ignore[attr-defined]


class VocabParallelEmbedding(nn.Module):
    """Word embedding that holds this rank's rows; fairscale's applies the padding row to every shard.

    The padding row, on the rank that has it, gets no gradient from the input side, as torch.nn.Embedding's.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, padding_idx: int, topology: Topology) -> None:
        super().__init__()
        self.topology = topology
        self.rows = num_embeddings // topology.tp
        self.first = self.rows * topology.tp_rank
        has_padding = self.first <= padding_idx < self.first + self.rows
        self.padding_idx = padding_idx - self.first if has_padding else None
        self.weight = nn.Parameter(torch.empty(self.rows, embedding_dim))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Vectors [..., D] of ids [...], the same on all tensor-parallel ranks."""
        local = input_ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_idx)
        return reduce_from_model_parallel_region(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))


class _VocabParallelCrossEntropy(torch.autograd.Function):
    """Cross entropy over logits whose vocabulary is spread over the tensor-parallel ranks."""

    @staticmethod
    def forward(
        ctx: Any, logits_MV: torch.Tensor, labels_M: torch.Tensor, first: int, group: dist.ProcessGroup
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits_MV = logits_MV.float()
        rows = logits_MV.shape[1]
        max_M = logits_MV.amax(1)
        dist.all_reduce(max_M, op=dist.ReduceOp.MAX, group=group)
        local_M = labels_M - first
        elsewhere_M = (local_M < 0) | (local_M >= rows)
        local_M = local_M.masked_fill(elsewhere_M, 0)
        label_logit_M = logits_MV.gather(1, local_M.unsqueeze(1)).squeeze(1).masked_fill(elsewhere_M, 0.0)
        exp_MV = (logits_MV - max_M.unsqueeze(1)).exp_()
        sums_2M = torch.stack([exp_MV.sum(1), label_logit_M])
        dist.all_reduce(sums_2M, group=group)
        sum_M, label_logit_M = sums_2M
        ctx.save_for_backward(exp_MV.div_(sum_M.unsqueeze(1)), local_M, elsewhere_M)
        correct_M = label_logit_M >= max_M
        ctx.mark_non_differentiable(correct_M)
        return sum_M.log() + max_M - label_logit_M, correct_M

    @staticmethod
    def backward(ctx: Any, grad_M: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        softmax_MV, local_M, elsewhere_M = ctx.saved_tensors
        grad_MV = softmax_MV.clone()
        grad_MV.scatter_add_(1, local_M.unsqueeze(1), (elsewhere_M.float() - 1.0).unsqueeze(1))
        return grad_MV.mul_(grad_M.unsqueeze(1)), None, None, None


class VocabParallelProjection(VocabProjection):
    """The decoder over this rank's rows of the vocabulary."""

    def __init__(self, num_embeddings: int, topology: Topology) -> None:
        self.rows = num_embeddings // topology.tp
        super().__init__(self.rows)
        self.topology = topology

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Logits [M, V_tp] of this rank's rows."""
        return super().forward(copy_to_model_parallel_region(hidden_MD))

    def token_losses(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy [M] in fp32 over the whole vocabulary, and whether [M] the label has the highest logit."""
        first = self.rows * self.topology.tp_rank
        return _VocabParallelCrossEntropy.apply(logits_MV, labels_M, first, self.topology.tp_group)

    def full_logits(self, logits_MV: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of the whole vocabulary on every rank."""
        return gather_from_model_parallel_region(logits_MV)


def _no_init(weight: torch.Tensor) -> torch.Tensor:
    # models/init.py gives every parameter its value; drawing here would cost a full matrix per rank for nothing.
    return weight


def parallel_parts(topology: Topology, dropout_key: DropoutKey) -> Parts:
    """The linear, embedding and head classes that the encoder is built from at this topology."""
    dropout = partial(KeyedDropout, key=dropout_key)
    if topology.tp == 1:
        return Parts(dropout=dropout)
    return Parts(
        column=partial(ColumnParallelLinear, gather_output=False, init_method=_no_init),
        row=partial(RowParallelLinear, input_is_parallel=True, init_method=_no_init),
        vocab_embedding=partial(VocabParallelEmbedding, topology=topology),
        vocab_projection=partial(VocabParallelProjection, topology=topology),
        dropout=dropout,
        into_split=copy_to_model_parallel_region,
    )
