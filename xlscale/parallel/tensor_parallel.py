"""Tensor parallelism as a table: TP_PLAN says how each parameter is split; what splits, merges and classifies reads it.

Legend: B batch, T tokens, I inputs (of this rank).
"""

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, reduce_from_model_parallel_region
from torch import nn

from xlscale.models.dropout import DropoutKey, KeyedDropout, seeded_attention
from xlscale.models.parts import Parts
from xlscale.parallel.sequence_parallel import (
    Gathered,
    columns,
    cut_tokens,
    into_columns,
    reduce_scatter_tokens,
    whole_tokens,
)
from xlscale.parallel.topology import Topology
from xlscale.parallel.vocabulary import VocabParallelEmbedding, VocabParallelProjection, rows_per_rank

COLUMN, ROW, VOCABULARY, TOKENWISE, REPLICATED = "column", "row", "vocabulary", "tokenwise", "replicated"

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
    "embeddings.position": TOKENWISE,
    "embeddings.token_type": TOKENWISE,
    "embeddings.norm": TOKENWISE,
    "attention_norm": TOKENWISE,
    "attention.distance": REPLICATED,
    "cross_attention_norm": TOKENWISE,
    "mlp_norm": TOKENWISE,
    "adapter_norm": TOKENWISE,
    "final_norm": TOKENWISE,
    "head.dense": REPLICATED,
    "head.norm": REPLICATED,
    "pooler.dense": REPLICATED,
    "classifier.dense": REPLICATED,
    "classifier.output": REPLICATED,
    "classifier": REPLICATED,
    "qa_outputs": REPLICATED,
}
"""Module path, without numbers and leading parts -> how its weight and bias lie over the tensor-parallel ranks.

A * stands for one name, that of a language. TOKENWISE and REPLICATED are whole on every rank; a TOKENWISE one works on
the residual stream, which under sequence parallelism is this rank's tokens, a REPLICATED one on what is whole.
"""

SPLIT_DIM = {
    (COLUMN, "weight"): 0,
    (COLUMN, "bias"): 0,
    (ROW, "weight"): 1,
    (ROW, "bias"): None,
    (VOCABULARY, "weight"): 0,
    (VOCABULARY, "bias"): 0,
    (TOKENWISE, "weight"): None,
    (TOKENWISE, "bias"): None,
    (REPLICATED, "weight"): None,
    (REPLICATED, "bias"): None,
}

OF_OWN_TOKENS = {(TOKENWISE, "weight"), (TOKENWISE, "bias"), (ROW, "bias")}
"""What sees this rank's tokens only under sequence parallelism: its gradient is the sum over the ranks."""


def plan_class(name: str) -> tuple[str, str]:
    """(class, "weight" or "bias") of a parameter, a key of SPLIT_DIM.

    Raises ValueError for a parameter that TP_PLAN does not know: guessing would train it wrongly in silence.
    """
    module, _, kind = name.rpartition(".")
    for suffix, style in TP_PLAN.items():
        if fnmatchcase(f".{module}", f"*.{suffix}") and (style, kind) in SPLIT_DIM:
            return style, kind
    raise ValueError(
        f"parameter {name} is in no class of TP_PLAN; add its module there (xlscale/parallel/tensor_parallel.py)"
    )


def split_dim(name: str) -> int | None:
    """Dimension along which the parameter is cut, None when every tensor-parallel rank holds all of it.

    ValueError for a parameter that is in no class.
    """
    return SPLIT_DIM[plan_class(name)]


def tensor_slice(full: torch.Tensor, name: str, tp_rank: int, tp: int) -> torch.Tensor:
    """The part of a full parameter that belongs to one tensor-parallel rank: a view, or padded with zero rows."""
    style, _ = plan_class(name)
    if style == VOCABULARY:
        rows = rows_per_rank(full.shape[0], tp)
        part = full[rows * tp_rank : rows * (tp_rank + 1)]
        return torch.cat([part, part.new_zeros(rows - len(part), *full.shape[1:])]) if len(part) < rows else part
    dim = split_dim(name)
    return full if dim is None else full.chunk(tp, dim)[tp_rank]


def merge_slices(slices: list[torch.Tensor], name: str, vocab_size: int) -> torch.Tensor:
    """The full parameter from the parts of all tensor-parallel ranks, in rank order; inverse of tensor_slice."""
    dim = split_dim(name)
    whole = slices[0] if dim is None else torch.cat(slices, dim)
    return whole[:vocab_size] if plan_class(name)[0] == VOCABULARY else whole


def full_shape(local: torch.Size | tuple[int, ...], name: str, tp: int, vocab_size: int) -> tuple[int, ...]:
    """Shape of the whole parameter, from the shape of one rank's part; a split vocabulary's padding does not count."""
    if plan_class(name)[0] == VOCABULARY:
        return (vocab_size, *local[1:])
    dim = split_dim(name)
    return tuple(size * tp if index == dim else size for index, size in enumerate(local))


def prepare_parameters(model: nn.Module, topology: Topology, sequence_parallel: bool) -> None:
    """Tell DeepSpeed which parameters are parts of larger ones, and sum what each rank's tokens give.

    Without the first the gradient norm is wrong, without the second the gradient.
    """
    for name, parameter in model.named_parameters():
        parameter.tensor_model_parallel = split_dim(name) is not None  # type: ignore[attr-defined]
        if sequence_parallel and topology.tp > 1 and plan_class(name) in OF_OWN_TOKENS:
            assert parameter.requires_grad, f"freeze {name} later: it would not be summed once it is trained again"
            # The hook sees what one backward pass adds, before the engine or .grad does.
            parameter.register_hook(partial(_sum_over_ranks, group=topology.tp_group))


def _sum_over_ranks(gradient: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    # A copy, as another gradient may be a view of this one; in fp32, as bf16 would round each addend's sum.
    total = gradient.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total.to(gradient.dtype)


class Column(nn.Linear):
    """This rank's outputs of a linear layer; it reads what into_columns or into_split gives."""

    def __init__(self, fan_in: int, fan_out: int, tp: int) -> None:
        assert fan_out % tp == 0, "config.check refuses this"
        super().__init__(fan_in, fan_out // tp)

    def reset_parameters(self) -> None:
        """Nothing: models/init.py gives every parameter its value."""

    def forward(self, entered: torch.Tensor | Gathered) -> torch.Tensor:
        """This rank's outputs [B, T, out / tp] of all tokens."""
        if isinstance(entered, Gathered):
            return columns(entered, self.weight, self.bias)
        return F.linear(entered, self.weight, self.bias)


class Row(nn.Linear):
    """A linear layer over this rank's inputs; `join` sums what the ranks found, the bias is added once after it."""

    def __init__(self, fan_in: int, fan_out: int, tp: int, join: Callable[[torch.Tensor], torch.Tensor]) -> None:
        assert fan_in % tp == 0, "config.check refuses this"
        super().__init__(fan_in // tp, fan_out)
        self.join = join

    def reset_parameters(self) -> None:
        """Nothing: models/init.py gives every parameter its value."""

    def forward(self, part_BTI: torch.Tensor) -> torch.Tensor:
        """From [B, T, in / tp] to the tokens that this rank's residual stream holds."""
        return self.join(F.linear(part_BTI, self.weight)) + self.bias


def parallel_parts(
    topology: Topology, dropout_key: DropoutKey, sequence_parallel: bool = False, activation_checkpointing: int = 0
) -> Parts:
    """What the encoder and its head are built from at this topology.

    activation_checkpointing: 0 = the backward pass finds what it needs, k = it computes every k-th layer again.
    """
    parts = Parts(
        dropout=partial(KeyedDropout, key=dropout_key),
        seeded_attention=partial(seeded_attention, key=dropout_key, tp_rank=topology.tp_rank),
        recomputed=lambda index: activation_checkpointing > 0 and index % activation_checkpointing == 0,
    )
    if topology.tp == 1:
        return parts
    join = partial(reduce_scatter_tokens, topology=topology) if sequence_parallel else reduce_from_model_parallel_region
    parts = replace(
        parts,
        column=partial(Column, tp=topology.tp),
        row=partial(Row, tp=topology.tp, join=join),
        vocab_embedding=partial(VocabParallelEmbedding, topology=topology, join=join),
        vocab_projection=partial(VocabParallelProjection, topology=topology),
        into_columns=copy_to_model_parallel_region,
        into_split=copy_to_model_parallel_region,
    )
    if not sequence_parallel:
        return parts
    return replace(
        parts,
        into_columns=partial(into_columns, topology=topology),
        cut_tokens=partial(cut_tokens, topology=topology),
        whole_tokens=partial(whole_tokens, topology=topology),
        # The residual stream is this rank's tokens; what a head drops is whole.
        dropout=lambda p, site: KeyedDropout(p, site, dropout_key, () if site < 0 else (topology.tp_rank,)),
    )
