"""The masked LM: the encoder and its head, which sees the masked positions only.

Legend: B batch, T tokens, D hidden, M masked positions (of all rows), V vocabulary.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from xlscale.config import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.encoder import Encoder
from xlscale.models.parts import PLAIN, Parts


class MaskedLMOutput(NamedTuple):
    """What one forward gives, per chosen position. A tuple, because ZeRO-3 finds tensors in tuples only."""

    losses_M: Tensor
    """Cross entropy of each masked token, fp32; empty without labels. The loop takes the mean."""
    rows_M: Tensor
    """Batch row of each chosen position."""
    correct_M: Tensor
    """Whether the best piece is the label, bool. Empty without labels."""
    logits_MV: Tensor | None
    """Scores over the whole vocabulary, only when no labels are given."""


class MaskedLMHead(nn.Module):
    """dense -> gelu -> LayerNorm -> word embeddings transposed + bias, all on the chosen positions."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        self.decoder = parts.vocab_projection(model.vocab_size)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        # The head's activation is the exact GELU in every family, whatever hidden_act says: as transformers.
        return self.decoder(self.norm(F.gelu(self.dense(hidden_MD))))


class MaskedLM(nn.Module):
    """Encoder and masked LM head with tied word embeddings."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__()
        self.encoder = Encoder(model, parts)
        self.head = MaskedLMHead(model, parts)
        word = self.encoder.embeddings.word.weight
        assert isinstance(word, nn.Parameter)
        self.head.decoder.weight = word

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> MaskedLMOutput:
        """Loss of every position that has a label, or, without labels, the logits of the positions chosen.

        labels: piece ids, -100 where nothing is predicted; none at all gives empty losses and zero gradients.
        attention_mask: as in Encoder. positions: bool, used without labels only; None = all.
        """
        # The four arguments are [B, T] and keep the names that transformers gives them.
        if labels is not None:
            assert positions is None, "labels choose the positions"
            positions = labels != IGNORE
        hidden_BTD = self.encoder(input_ids, attention_mask)
        B, T, _ = hidden_BTD.shape
        if positions is None:
            positions = input_ids.new_ones(B, T)
        chosen_M = positions.flatten().nonzero().squeeze(1)  # index into B*T; the one host synchronisation
        logits_MV = self.head(hidden_BTD.flatten(0, 1).index_select(0, chosen_M))
        rows_M = chosen_M // T
        if labels is None:
            nothing = logits_MV.new_empty(0)
            return MaskedLMOutput(nothing, rows_M, nothing.bool(), self.head.decoder.full_logits(logits_MV))
        labels_M = labels.flatten().index_select(0, chosen_M)
        losses_M, correct_M = self.head.decoder.token_losses(logits_MV, labels_M)
        return MaskedLMOutput(losses_M, rows_M, correct_M, None)

    def logits(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V], or [M, V] of the positions where `positions` (bool [B, T]) holds, row by row."""
        output = self(input_ids, attention_mask=attention_mask, positions=positions)
        logits_MV: Tensor = output.logits_MV
        return logits_MV if positions is not None else logits_MV.view(*input_ids.shape, -1)
