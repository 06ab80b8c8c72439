"""The bare model, and what all heads have in common: an encoder and its languages.

Legend: B batch, T tokens, D hidden.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.models.encoder import Encoder
from xlscale.models.outputs import ModelOutput
from xlscale.models.parts import PLAIN, Parts

AdapterReader = Callable[["OnEncoder", str | Path, str, bool], Callable[[str], Tensor]]
"""(model, source, language, other_trunk) -> what Encoder.add_language reads."""


class OnEncoder(nn.Module):
    """An encoder with something on it. Every head is one; its forward hands what it does not know to the encoder."""

    architecture: ClassVar[str]
    """How the Hub's `architectures` end for this head, a key of HEADS."""

    reads_adapters: AdapterReader | None = None
    """How add_adapter reads files, of which a model knows nothing: handed in by whoever read the model."""

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

    def add_adapter(self, source: str | Path, language: str, *, other_trunk: bool = False) -> None:
        """Put in the adapters of a language, from its adapter file or a Hub folder that has it; its id is the last one.

        They must have been made on this model's trunk, by digest; other_trunk: not necessarily, as after the trunk was
        fine-tuned. Not while a forward runs. ValueError, with nothing changed, for whatever does not fit.
        """
        if self.reads_adapters is None:
            raise ValueError("this model came from no folder; load it by xlscale.load_pretrained to add adapters")
        self.encoder.add_language(language, self.reads_adapters(self, source, language, other_trunk))

    def remove_adapter(self, language: str) -> None:
        """Drop a language's adapters and their memory; the ids of the languages after it fall by one, see lang_ids."""
        self.encoder.remove_language(language)

    def lang_ids(self, languages: Sequence[str]) -> Tensor:
        """The ids of the samples' languages as they are now [B]."""
        known = self.config.languages
        for language in languages:
            if language not in known:
                raise ValueError(
                    f"there is no adapter for {language!r}; the languages are {', '.join(known) or 'none'}"
                )
        return torch.tensor([known.index(language) for language in languages])

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
