"""The vocabulary over tensor-parallel ranks: word embedding, decoder and loss, each rank with its own rows.

Every rank holds the same number of rows, ceil(V / tp). Rows past V are padding: zero, without probability, never
trained; the last ranks may hold nothing else. No whole tensor has them.

Legend: M masked positions, D hidden, V vocabulary (of this rank, padding included, in what is split).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from fairscale.nn.model_parallel.mappings import copy_to_model_parallel_region, gather_from_model_parallel_region
from torch import nn

from xlscale.models.parts import VocabProjection
from xlscale.parallel.topology import Topology


def rows_per_rank(vocab_size: int, tp: int) -> int:
    """Rows of the vocabulary that each tensor-parallel rank holds, padding included."""
    return -(-vocab_size // tp)


class VocabParallelEmbedding(nn.Module):
    """Word embedding that holds this rank's rows; fairscale's applies the padding row to every shard.

    The row of the padding token, on the rank that has it, gets no gradient from the input side, as
    torch.nn.Embedding's. `join` sums what the ranks found.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int,
        topology: Topology,
        join: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        super().__init__()
        self.join = join
        self.rows = rows_per_rank(num_embeddings, topology.tp)
        self.first = self.rows * topology.tp_rank
        has_padding = self.first <= padding_idx < self.first + self.rows
        self.padding_idx = padding_idx - self.first if has_padding else None
        self.weight = nn.Parameter(torch.empty(self.rows, embedding_dim))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Vectors [B, T, D] of ids [B, T], or of the tokens that `join` leaves this rank."""
        local = input_ids - self.first
        elsewhere = (local < 0) | (local >= self.rows)
        found = F.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_idx)
        return self.join(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))


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
        self.vocab_size, self.rows = num_embeddings, rows_per_rank(num_embeddings, topology.tp)
        super().__init__(self.rows)
        self.topology = topology
        self.first = self.rows * topology.tp_rank

    def forward(self, hidden_MD: torch.Tensor) -> torch.Tensor:
        """Logits [M, V] of this rank's rows; those of padding are -inf, which no softmax sees."""
        logits_MV = super().forward(copy_to_model_parallel_region(hidden_MD))
        real = self.vocab_size - self.first
        if real < self.rows:
            # In place: the product does not need its result again. Not by cutting the weight: under ZeRO-3 a view of it
            # would keep the gathered rows.
            logits_MV.masked_fill_(torch.arange(self.rows, device=logits_MV.device) >= real, -torch.inf)
        return logits_MV

    def token_losses(self, logits_MV: torch.Tensor, labels_M: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross entropy [M] in fp32 over the whole vocabulary, and whether [M] the label has the highest logit."""
        return _VocabParallelCrossEntropy.apply(logits_MV, labels_M, self.first, self.topology.tp_group)

    def full_logits(self, logits_MV: torch.Tensor) -> torch.Tensor:
        """Logits of the whole vocabulary on every rank, without padding."""
        return gather_from_model_parallel_region(logits_MV)[..., : self.vocab_size]
