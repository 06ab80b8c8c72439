"""The classifying heads: of sequences, tokens, choices and answer spans. Losses are those of transformers, in fp32.

Legend: B batch, C choices, T tokens, D hidden, L labels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.bare import OnEncoder, Pooler
from xlscale.models.outputs import ClassifierOutput, QuestionAnsweringOutput
from xlscale.models.parts import PLAIN, Parts

# The encoder's sites count from 0 upwards.
FIRST_SITE, SECOND_SITE = -1, -2


def _dropout_prob(model: ModelConfig) -> float:
    return model.hidden_dropout_prob if model.classifier_dropout is None else model.classifier_dropout


def cross_entropy(logits_ML: Tensor, labels_M: Tensor, ignored: int = IGNORE) -> Tensor:
    """Mean over the labels that are not `ignored`; 0, and zero gradients, where all are (torch gives NaN)."""
    total = F.cross_entropy(logits_ML.float(), labels_M.long(), ignore_index=ignored, reduction="sum")
    return total / (labels_M != ignored).sum().clamp(min=1)


def _regression(logits_BL: Tensor, labels: Tensor) -> Tensor:
    return F.mse_loss(logits_BL.float(), _as_many(logits_BL, labels).float())


def _single_label(logits_BL: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits_BL, labels.flatten())


def _multi_label(logits_BL: Tensor, labels: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits_BL.float(), _as_many(logits_BL, labels).float())


def _as_many(logits_BL: Tensor, labels: Tensor) -> Tensor:
    # torch would broadcast in silence.
    if labels.numel() != logits_BL.numel():
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits_BL.shape)}; give one per logit")
    return labels.view_as(logits_BL)


SEQUENCE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "regression": _regression,
    "single_label_classification": _single_label,
    "multi_label_classification": _multi_label,
}
"""problem_type -> mean loss of (logits [B, L], labels)."""


def problem_type(model: ModelConfig, labels: Tensor) -> str:
    """The config's, or, where it says nothing, what transformers concludes from num_labels and the labels' dtype."""
    if model.problem_type:
        return model.problem_type
    if model.num_labels == 1:
        return "regression"
    whole = labels.dtype in (torch.int64, torch.int32)
    return "single_label_classification" if whole else "multi_label_classification"


class SequenceHead(nn.Module):
    """dropout -> dense -> tanh -> dropout -> output, of the first token."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.dense_dropout = parts.dropout(_dropout_prob(model), FIRST_SITE)
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.output_dropout = parts.dropout(_dropout_prob(model), SECOND_SITE)
        self.output = nn.Linear(model.hidden_size, model.num_labels)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        first_BD = torch.tanh(self.dense(self.dense_dropout(hidden_BTD[:, 0])))
        return self.output(self.output_dropout(first_BD))


class ForSequenceClassification(OnEncoder):
    """One score per label and sample; problem_type says what the loss is."""

    architecture = "ForSequenceClassification"

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__(model, parts)
        self.classifier = SequenceHead(model, parts)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> ClassifierOutput:
        """Logits [B, L], and with `labels` the loss; all other arguments are Encoder.forward's.

        labels: a class [B], or a value or a 0/1 per label [B, L]; ValueError where there is not one per logit.
        """
        out = self.encoder(input_ids, attention_mask, **inputs)
        logits_BL = self.classifier(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = SEQUENCE_LOSSES[problem_type(self.config, labels)](logits_BL, labels)
        return ClassifierOutput(loss, logits_BL, out.hidden_states, out.attentions)


class ForTokenClassification(OnEncoder):
    """One score per label and token."""

    architecture = "ForTokenClassification"

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__(model, parts)
        self.dropout = parts.dropout(_dropout_prob(model), FIRST_SITE)
        self.classifier = nn.Linear(model.hidden_size, model.num_labels)
        # transformers leaves out the labels of tokens that are not attended to in this family only.
        self.attended_labels_only = model.model_type == "xlm-roberta-xl"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> ClassifierOutput:
        """Logits [B, T, L], and with `labels` ([B, T], -100 = none) the loss; all other arguments are the encoder's."""
        out = self.encoder(input_ids, attention_mask, **inputs)
        logits_BTL = self.classifier(self.dropout(out.last_hidden_state))
        loss = None
        if labels is not None:
            if self.attended_labels_only and attention_mask is not None and attention_mask.dim() == 2:
                labels = labels.masked_fill(attention_mask != 1, IGNORE)
            loss = cross_entropy(logits_BTL.flatten(0, 1), labels.flatten())
        return ClassifierOutput(loss, logits_BTL, out.hidden_states, out.attentions)


class ForMultipleChoice(OnEncoder):
    """One score per choice; each choice is a sequence of its own."""

    architecture = "ForMultipleChoice"

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__(model, parts)
        self.pooler = Pooler(model)
        self.dropout = parts.dropout(model.hidden_dropout_prob, FIRST_SITE)  # not classifier_dropout: as transformers
        self.classifier = nn.Linear(model.hidden_size, 1)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        lang_ids: Tensor | None = None,
        labels: Tensor | None = None,
        **inputs: Any,
    ) -> ClassifierOutput:
        """Logits [B, C], and with `labels` (the right choice [B]) the loss.

        All other arguments are Encoder.forward's, with a dimension C after B: input_ids [B, C, T], attention_mask
        [B, C, T] or [B, C, T, T]. lang_ids: one per sample [B], or per choice [B, C].
        """
        given = inputs_embeds if input_ids is None else input_ids
        if given is None:
            raise ValueError("neither input_ids nor inputs_embeds; give one of them")
        B, C = given.shape[:2]
        if lang_ids is not None:
            if lang_ids.shape not in ((B,), (B, C)):
                raise ValueError(
                    f"lang_ids {tuple(lang_ids.shape)} must be one per sample, ({B},), or per choice, ({B}, {C})"
                )
            lang_ids = lang_ids.view(B, -1).expand(B, C)

        def flat(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        out = self.encoder(
            flat(input_ids),
            flat(attention_mask),
            inputs_embeds=flat(inputs_embeds),
            token_type_ids=flat(token_type_ids),
            position_ids=flat(position_ids),
            lang_ids=flat(lang_ids),
            **inputs,
        )
        logits_BC = self.classifier(self.dropout(self.pooler(out.last_hidden_state))).view(B, C)
        loss = None if labels is None else cross_entropy(logits_BC, labels.flatten())
        return ClassifierOutput(loss, logits_BC, out.hidden_states, out.attentions)


class ForQuestionAnswering(OnEncoder):
    """Scores of each token as the first and as the last of the answer."""

    architecture = "ForQuestionAnswering"

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        if model.num_labels != 2:
            raise ValueError(f"num_labels={model.num_labels} must be 2 for question answering: a start and an end")
        super().__init__(model, parts)
        self.qa_outputs = nn.Linear(model.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        **inputs: Any,
    ) -> QuestionAnsweringOutput:
        """Start and end logits [B, T], and with both positions [B] the loss; all other arguments are the encoder's.

        A position of T or more lies in a part of the text that was cut off, and is ignored; below 0 it counts as 0
        (both as in transformers).
        """
        out = self.encoder(input_ids, attention_mask, **inputs)
        start_BT, end_BT = self.qa_outputs(out.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            T = start_BT.shape[1]
            start_B, end_B = (positions.flatten().clamp(0, T) for positions in (start_positions, end_positions))
            loss = (cross_entropy(start_BT, start_B, ignored=T) + cross_entropy(end_BT, end_B, ignored=T)) / 2
        return QuestionAnsweringOutput(loss, start_BT, end_BT, out.hidden_states, out.attentions)
