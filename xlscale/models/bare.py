"""The bare model, and what all heads have in common: an encoder and its languages.

Legend: B batch, T tokens, D hidden.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.models.encoder import Encoder
from xlscale.models.outputs import ModelOutput
from xlscale.models.parts import PLAIN, Parts


class OnEncoder(nn.Module):
    """An encoder with something on it. Every head is one; its forward hands what it does not know to the encoder."""

    architecture: ClassVar[str]
    """How the Hub's `architectures` end for this head, a key of HEADS."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__()
        self.encoder = Encoder(model, parts)

    @property
    def config(self) -> ModelConfig:
        """What the model was built from, with the default language that was set since."""
        return self.encoder.config

    def set_default_language(self, language: str) -> None:
        """As Encoder.set_default_language."""
        self.encoder.set_default_language(language)

    def freeze_embeddings_and_language_adapters(self) -> None:
        """As Encoder.freeze_embeddings_and_language_adapters."""
        self.encoder.freeze_embeddings_and_language_adapters()

    def cache_wanted(self, use_cache: bool | None) -> bool:
        """Whether to return keys and values where the caller did not say: a decoder does as its config says."""
        return self.config.is_decoder and self.config.use_cache if use_cache is None else use_cache


class Pooler(nn.Module):
    """tanh(dense) of the first token."""

    def __init__(self, model: ModelConfig):
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_BTD[:, 0]))


class Model(OnEncoder):
    """The encoder, and, with `pooler`, one vector per sample."""

    architecture = "Model"

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN, pooler: bool = True):
        super().__init__(model, parts)
        self.pooler = Pooler(model) if pooler else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> ModelOutput:
        """Hidden states; all other arguments are Encoder.forward's."""
        out = self.encoder(input_ids, attention_mask, use_cache=self.cache_wanted(use_cache), **inputs)
        pooled_BD = None if self.pooler is None else self.pooler(out.last_hidden_state)
        return ModelOutput(
            out.last_hidden_state,
            pooled_BD,
            out.past_key_values,
            out.hidden_states,
            out.attentions,
            out.cross_attentions,
        )
