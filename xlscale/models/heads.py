"""The masked LM, whose head sees the masked positions only in training, and the table of all heads.

Legend: B batch, T tokens, D hidden, M masked positions (of all rows), V vocabulary.
"""

from typing import Any, NamedTuple

from torch import Tensor

from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.bare import Model, OnEncoder
from xlscale.models.classification import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from xlscale.models.families import Leaves
from xlscale.models.lm import ForCausalLM, OnEncoderLM, mean_loss
from xlscale.models.outputs import LMOutput


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


class MaskedLM(OnEncoderLM):
    """The masked LM as it is trained: no tensor of batch x length x vocabulary is made."""

    architecture = "ForMaskedLM"

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        positions: Tensor | None = None,
        **inputs: Any,
    ) -> MaskedLMOutput:
        """Loss of every position that has a label, or, without labels, the logits of the positions chosen.

        labels: piece ids, -100 where nothing is predicted; none at all gives empty losses and zero gradients.
        attention_mask: as in Encoder. positions: bool, used without labels only; None = all. inputs: Encoder's others.
        """
        # The four arguments are [B, T] and keep the names that transformers gives them.
        if labels is not None:
            assert positions is None, "labels choose the positions"
            positions = labels != IGNORE
        hidden_BTD = self.encoder(input_ids, attention_mask, **inputs).last_hidden_state
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
        **inputs: Any,
    ) -> Tensor:
        """Logits [B, T, V], or [M, V] of the positions where `positions` (bool [B, T]) holds, row by row."""
        output = MaskedLM.forward(self, input_ids, None, attention_mask, positions, **inputs)
        logits_MV = output.logits_MV
        assert logits_MV is not None
        return logits_MV if positions is not None else logits_MV.view(*input_ids.shape, -1)


class ForMaskedLM(MaskedLM):
    """The masked LM as transformers has it: logits of every position. The same parameters as MaskedLM."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> LMOutput:
        """Logits [B, T, V], and with `labels` (ids [B, T], -100 where nothing is predicted) the loss.

        All other arguments are Encoder.forward's.
        """
        out = self.encoder(input_ids, attention_mask, **inputs)
        logits_BTV = self.head(out.last_hidden_state)
        loss = None if labels is None else mean_loss(self.head.decoder, logits_BTV, labels)
        return LMOutput(loss, self.head.decoder.full_logits(logits_BTV), out.hidden_states, out.attentions)


HEADS: dict[str, type[OnEncoder]] = {
    "Model": Model,
    "ForMaskedLM": ForMaskedLM,
    "ForCausalLM": ForCausalLM,
    "ForSequenceClassification": ForSequenceClassification,
    "ForMultipleChoice": ForMultipleChoice,
    "ForTokenClassification": ForTokenClassification,
    "ForQuestionAnswering": ForQuestionAnswering,
}
"""How the Hub's `architectures` end -> our class, built from (ModelConfig, Parts)."""


def head_shapes(model: ModelConfig, head: str, pooler: bool = True) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter outside the encoder, as the class registers them, the tied weight left out.

    head: a key of HEADS. pooler: whether the bare model has one.
    """
    V, D, L = model.vocab_size, model.hidden_size, model.num_labels

    def linear(fan_in: int, fan_out: int) -> Leaves:
        return {"weight": (fan_out, fan_in), "bias": (fan_out,)}

    lm: dict[str, Leaves] = {
        "head.dense": linear(D, D),
        "head.norm": {"weight": (D,), "bias": (D,)},
        "head.decoder": {"bias": (V,)},
    }
    modules: dict[str, dict[str, Leaves]] = {
        "Model": {"pooler.dense": linear(D, D)} if pooler else {},
        "ForMaskedLM": lm,
        "ForCausalLM": lm,
        "ForSequenceClassification": {"classifier.dense": linear(D, D), "classifier.output": linear(D, L)},
        "ForMultipleChoice": {"pooler.dense": linear(D, D), "classifier": linear(D, 1)},
        "ForTokenClassification": {"classifier": linear(D, L)},
        "ForQuestionAnswering": {"qa_outputs": linear(D, L)},
    }
    return {f"{module}.{leaf}": shape for module, leaves in modules[head].items() for leaf, shape in leaves.items()}
