"""What the heads return, with the field names of transformers; NamedTuples, because ZeRO-3 finds tensors in tuples.

B batch, C choices, T tokens, D hidden, V vocabulary, L labels. `hidden_states`, `attentions` and `cross_attentions` are
one tensor per layer (hidden_states one more, the embeddings first), and None unless they were asked for.
"""

from typing import Any, NamedTuple

from torch import Tensor

Tensors = tuple[Tensor, ...] | None


class ModelOutput(NamedTuple):
    """Of the bare model."""

    last_hidden_state: Tensor
    """[B, T, D], after the final norm where the family has one."""
    pooler_output: Tensor | None = None
    """[B, D]; None without a pooler."""
    past_key_values: Any = None
    """Keys and values of all tokens so far, to be handed to the next call; None unless use_cache."""
    hidden_states: Tensors = None
    attentions: Tensors = None
    cross_attentions: Tensors = None


class LMOutput(NamedTuple):
    """Of the masked LM."""

    loss: Tensor | None
    """Mean cross entropy of the labels that are not -100; None without labels."""
    logits: Tensor
    """[B, T, V]."""
    hidden_states: Tensors = None
    attentions: Tensors = None


class CausalLMOutput(NamedTuple):
    """Of the causal LM."""

    loss: Tensor | None
    """Mean cross entropy of each next token whose label is not -100; None without labels."""
    logits: Tensor
    """[B, T, V]."""
    past_key_values: Any = None
    """As in ModelOutput."""
    hidden_states: Tensors = None
    attentions: Tensors = None
    cross_attentions: Tensors = None


class ClassifierOutput(NamedTuple):
    """Of sequence classification [B, L], token classification [B, T, L] and multiple choice [B, C]."""

    loss: Tensor | None
    logits: Tensor
    hidden_states: Tensors = None
    attentions: Tensors = None


class QuestionAnsweringOutput(NamedTuple):
    """Of question answering."""

    loss: Tensor | None
    """Mean of the two cross entropies; None unless both positions are given."""
    start_logits: Tensor
    """[B, T]: score of each token as the first of the answer."""
    end_logits: Tensor
    """[B, T]: score of each token as the last of the answer."""
    hidden_states: Tensors = None
    attentions: Tensors = None
