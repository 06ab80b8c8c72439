"""What the model is built from: parallelism is handed in here, so that the model never learns its rank.

Legend: M masked positions, D hidden, V vocabulary (of this rank, where the projection is split).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# As transformers names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The function of a `hidden_act`; an unknown name is a ValueError."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act={name!r} is not known; use one of {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class VocabProjection(nn.Module):
    """Scores of every piece: tied word embeddings transposed, plus a bias.

    A vocabulary-parallel version is a subclass that holds this rank's rows and overrides the three methods.
    """

    weight: nn.Parameter

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_parameter("weight", None)  # the model assigns the word embedding's weight: tied, never copied
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Logits [M, V]."""
        return F.linear(hidden_MD, self.weight, self.bias)

    def token_losses(self, logits_MV: Tensor, labels_M: Tensor) -> tuple[Tensor, Tensor]:
        """Cross entropy of each token in fp32 [M], and whether its best piece is the label [M], bool."""
        losses_M = F.cross_entropy(logits_MV.float(), labels_M, reduction="none")
        return losses_M, logits_MV.detach().argmax(dim=-1) == labels_M

    def full_logits(self, logits_MV: Tensor) -> Tensor:
        """Logits over the whole vocabulary: a split projection gathers them, for reading only."""
        return logits_MV


@dataclass(frozen=True)
class Parts:
    """The module classes that parallelism replaces; the defaults are the plain ones of one process."""

    column: Callable[[int, int], nn.Module] = nn.Linear
    """(in, out): a linear layer whose outputs may be split over tensor-parallel ranks; it reads what into_columns or
    into_split gives."""
    row: Callable[[int, int], nn.Module] = nn.Linear
    """(in, out): a linear layer whose inputs may be split; its output joins the residual stream."""
    vocab_embedding: Callable[[int, int, int], nn.Module] = nn.Embedding
    """(rows, hidden, padding row): an embedding whose rows may be split; it has an attribute `weight`. It reads the
    ids of all tokens and gives vectors of those that this rank's residual stream holds."""
    vocab_projection: Callable[[int], VocabProjection] = VocabProjection
    """(rows): the decoder, whose `weight` the model sets to the embedding's."""
    dropout: Callable[[float, int], nn.Module] = lambda p, site: nn.Dropout(p)
    """(p, site): dropout with noise keyed by place. `site` numbers the places of the residual stream from 0 upwards;
    those below 0 are a head's, whose activations are whole on every rank."""
    seeded_attention: Callable[[int], AbstractContextManager[None]] = lambda site: nullcontext()
    """(site): entered while attention weights are dropped, whose noise comes from torch's own generator, as
    fused kernels take it from there. Each rank drops weights of its own heads; site numbers the attentions."""
    into_columns: Callable[[Tensor], Any] = lambda x: x
    """What the residual stream goes through, once, before the column layers that read it; what it gives is for
    them alone. Forward all tokens, backward the sum of the ranks' gradients."""
    into_split: Callable[[Tensor], Tensor] = lambda x: x
    """The same for what is whole on every rank whatever happens to the residual stream, such as another encoder's
    states: forward nothing, backward the sum of the ranks' gradients."""
    cut_tokens: Callable[[Tensor], Tensor] = lambda x: x
    """From [B, T, ...], whole on every rank, to the tokens that this rank's residual stream holds."""
    whole_tokens: Callable[[Tensor], Tensor] = lambda x: x
    """The way back, for the heads, which compute the same on every rank."""
    recomputed: Callable[[int], bool] = lambda index: False
    """Whether layer `index` keeps only its input for the backward pass, which then computes the layer again."""


PLAIN = Parts()
"""One process, nothing split."""
