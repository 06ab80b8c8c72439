"""The encoder of RoBERTa, XLM-R (post-LN), XLM-R XL/XXL (pre-LN) and X-MOD (either, with adapters).

Legend: B batch, T tokens, K keys (cached tokens and these), D hidden, N heads.
A module touches its own parameters only: ZeRO-3 gathers them module by module.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.models.adapters import Adapter, Adapters, route
from xlscale.models.attention import cross_mask, self_mask
from xlscale.models.families import layout
from xlscale.models.layer import Layer, LayerInput, recomputed
from xlscale.models.parts import PLAIN, Parts

Cache = tuple[tuple[Tensor, ...], ...]
"""For each layer its keys and values [B, N, K, H], then those of cross-attention where there is one."""


class EncoderOutput(NamedTuple):
    """What one forward gives. A tuple, because ZeRO-3 finds tensors in tuples, lists and dicts only."""

    last_hidden_state: Tensor
    """[B, T, D], after the final LayerNorm where the family has one."""
    past_key_values: Cache | None = None
    """With use_cache: what to pass to the next call together with the next tokens."""
    hidden_states: tuple[Tensor, ...] | None = None
    """With output_hidden_states: the embeddings, then what each layer gives; the last one is last_hidden_state."""
    attentions: tuple[Tensor, ...] | None = None
    """With output_attentions: the weights [B, N, T, K] of each layer."""
    cross_attentions: tuple[Tensor, ...] | None = None
    """The same of cross-attention, where there is one."""


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised where the family does so."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        D, pad = model.hidden_size, model.pad_token_id
        self.pad_token_id = pad
        self.absolute = model.position_embedding_type == "absolute"
        self.cut_tokens = parts.cut_tokens
        self.max_tokens = model.max_position_embeddings - (pad + 1 if self.absolute else 0)
        self.word = parts.vocab_embedding(model.vocab_size, D, pad)
        # With relative positions the table is there and unused, as in transformers.
        self.position = nn.Embedding(model.max_position_embeddings, D, padding_idx=pad)
        self.token_type = nn.Embedding(model.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=model.layer_norm_eps) if layout(model).embedding_norm else None
        self.dropout = parts.dropout(model.hidden_dropout_prob, 0)

    def forward(
        self,
        input_ids_BT: Tensor | None,
        inputs_embeds_BTD: Tensor | None = None,
        token_type_ids_BT: Tensor | None = None,
        position_ids_BT: Tensor | None = None,
        past: int = 0,
    ) -> Tensor:
        """Embedded tokens [B, T, D], those of this rank's residual stream; `past` others came before."""
        given = input_ids_BT if inputs_embeds_BTD is None else inputs_embeds_BTD
        assert given is not None, "the encoder looks"
        tokens = past + given.shape[1]
        if tokens > self.max_tokens:
            raise ValueError(
                f"a sequence of {tokens} tokens is longer than the model's {self.max_tokens}; cut it, or raise "
                f"max_position_embeddings (tokens{f' + {self.pad_token_id + 1}' if self.absolute else ''})"
            )
        if token_type_ids_BT is None:
            token_type_ids_BT = torch.zeros(given.shape[:2], dtype=torch.long, device=given.device)
        # Ids are cut first, so that each rank looks up its own tokens only.
        type_BTD = self.token_type(self.cut_tokens(token_type_ids_BT))
        word_BTD = self.word(input_ids_BT) if inputs_embeds_BTD is None else self.cut_tokens(inputs_embeds_BTD)
        # Added in the order of transformers, for the same rounding.
        embedded_BTD: Tensor = word_BTD + type_BTD
        if self.absolute:
            if position_ids_BT is None:
                position_ids_BT = self._positions(input_ids_BT, given, past)
            embedded_BTD = embedded_BTD + self.position(self.cut_tokens(position_ids_BT))
        if self.norm is not None:
            embedded_BTD = self.norm(embedded_BTD)
        output_BTD: Tensor = self.dropout(embedded_BTD)
        return output_BTD

    def _positions(self, input_ids_BT: Tensor | None, given: Tensor, past: int) -> Tensor:
        """The first token is at pad + 1 and padding stays at pad; integer kernels, no host sync."""
        if input_ids_BT is None:  # padding does not show in vectors
            first = self.pad_token_id + 1 + past
            return torch.arange(first, first + given.shape[1], device=given.device)[None]
        real_BT = (input_ids_BT != self.pad_token_id).long()
        return (real_BT.cumsum(dim=1) + past) * real_BT + self.pad_token_id


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__()
        self.config = model
        self.embeddings = Embeddings(model, parts)
        self.layers = nn.ModuleList(Layer(model, index, parts) for index in range(model.num_hidden_layers))
        self.whole_tokens, self.recomputed = parts.whole_tokens, parts.recomputed
        final_norm = layout(model).final_norm
        self.final_norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps) if final_norm else None

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        lang_ids: Tensor | None = None,
        head_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Hidden states of `input_ids` [B, T], or of `inputs_embeds` [B, T, D] in their place.

        attention_mask: 1 or True where a token is attended to, [B, K] or [B, T, K]; the latter stands as it is, also
        in a decoder. None means that nothing is padded, and is faster: the fastest attention kernels take no mask.
        token_type_ids, position_ids: [B, T]; by default all 0, and pad_token_id + 1 onwards with padding passed over.
        lang_ids: [B], positions in config.languages, on the CPU rather than on a GPU; by default the default language.
        head_mask: factor of each head, [N] or [layers, N]. encoder_hidden_states: [B, S, D], what a decoder with
        cross-attention attends to, and encoder_attention_mask: [B, S] or [B, T, S].
        past_key_values: of an earlier call with use_cache; input_ids are then the tokens that follow.
        ValueError for what this model has no use for: nothing that is given is ignored.
        """
        # The arguments keep the names that transformers gives them.
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, and not both")
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        (B, T), device = given.shape[:2], given.device
        self._refuse_useless(lang_ids, encoder_hidden_states, encoder_attention_mask, past_key_values, use_cache)
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        layer_input = LayerInput(
            mask=self_mask(attention_mask, B, T, past, self.config.is_decoder, device),
            routing=route(lang_ids, B, self.config, device) if self.config.languages else None,
            states_BKD=encoder_hidden_states,
            use_cache=use_cache,
            output_attentions=output_attentions,
        )
        if encoder_hidden_states is not None:
            keys = encoder_hidden_states.shape[1]
            layer_input = layer_input._replace(cross_mask=cross_mask(encoder_attention_mask, B, T, keys))

        hidden_BTD = self.embeddings(input_ids, inputs_embeds, token_type_ids, position_ids, past)
        states, caches, weights, cross_weights = [hidden_BTD], [], [], []
        # A layer that is computed again gives nothing but hidden states.
        cached = use_cache or past_key_values is not None
        may_recompute = self.training and torch.is_grad_enabled() and not (cached or output_attentions)
        for index, layer in enumerate(self.layers):
            given_here = layer_input._replace(
                past=None if past_key_values is None else past_key_values[index],
                head_mask_N=None if head_mask is None else self._head_mask(head_mask, index),
            )
            again = may_recompute and hidden_BTD.requires_grad and self.recomputed(index)
            run: Callable[..., Any] = partial(recomputed, layer) if again else layer
            output = run(hidden_BTD, given_here)
            hidden_BTD = output.hidden_BTD
            states = [*states, hidden_BTD] if output_hidden_states else []
            caches.append(output.cached)
            weights.append(output.weights_BNTK)
            cross_weights.append(output.cross_weights_BNTK)
        if self.final_norm is not None:
            hidden_BTD = self.final_norm(hidden_BTD)
        hidden_BTD = self.whole_tokens(hidden_BTD)
        if output_hidden_states:
            states = [*map(self.whole_tokens, states[:-1]), hidden_BTD]
        crossed = output_attentions and encoder_hidden_states is not None
        return EncoderOutput(
            hidden_BTD,
            tuple(caches) if use_cache else None,
            tuple(states) if output_hidden_states else None,
            tuple(weights) if output_attentions else None,
            tuple(cross_weights) if crossed else None,
        )

    def set_default_language(self, language: str) -> None:
        """The language of samples that come without lang_ids, "" = none; ValueError naming the known ones."""
        if language and language not in self.config.languages:
            known = ", ".join(self.config.languages) or "none: this model has no adapters"
            raise ValueError(f"there is no adapter for {language!r}; the languages are {known}")
        self.config = replace(self.config, default_language=language)

    def add_language(self, language: str, read: Callable[[str], Tensor]) -> None:
        """Give a language the adapters that `read` gives by our names, without "encoder."; its id is the last one.

        They go where the other adapters are, in their dtype. Nothing has changed when `read` fails. Not while a
        forward runs. ValueError for a model without adapters and for a language that it has.
        """
        config = self.config
        if not config.languages:
            raise ValueError(f"a model of type {config.model_type} has no adapters; use an xmod model")
        if language in config.languages:
            raise ValueError(f"{language} has adapters already; remove_adapter({language!r}) comes before others")
        banks, made = self._adapters(), []
        for index, bank in enumerate(banks):
            like = next(bank.parameters())
            adapter = Adapter(config, PLAIN).to(device="meta").train(self.training)
            for name, _ in list(adapter.named_parameters()):
                module, leaf = adapter.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
                value = read(f"layers.{index}.adapters.{language}.{name}")
                # A copy: what was read may be a view of a file.
                setattr(module, leaf, nn.Parameter(torch.empty(value.shape, dtype=like.dtype).copy_(value)))
            made.append(adapter.to(like.device))
        for bank, adapter in zip(banks, made, strict=True):
            bank[language] = adapter
        self.config = replace(config, languages=[*config.languages, language])

    def remove_language(self, language: str) -> None:
        """Drop a language's adapters; the ids of those after it fall by one. Not while a forward runs.

        ValueError for a language that the model has not, for the default one and for the last one.
        """
        config = self.config
        if language not in config.languages:
            known = ", ".join(config.languages) or "none: this model has no adapters"
            raise ValueError(f"there is no adapter for {language!r}; the languages are {known}")
        if language == config.default_language:
            raise ValueError(f"{language} is the default language; set_default_language() to another first")
        if len(config.languages) == 1:
            raise ValueError(f"{language} is the only language; add another first")
        self.config = replace(config, languages=[code for code in config.languages if code != language])
        for bank in self._adapters():
            del bank[language]

    def freeze_embeddings_and_language_adapters(self) -> None:
        """Train neither embeddings nor adapters, as before fine-tuning in one language for use in others.

        The LayerNorm before the adapters is theirs; a tied decoder's weight is the word embedding's. ValueError where
        there are no adapters.
        """
        if not self.config.languages:
            raise ValueError(f"a model of type {self.config.model_type} has no adapters to freeze; use an xmod model")
        frozen = [self.embeddings, *(layer.adapters for layer in self.layers)]
        frozen += [layer.adapter_norm for layer in self.layers if layer.adapter_norm is not None]
        for module in frozen:
            module.requires_grad_(False)

    def _adapters(self) -> list[Adapters]:
        return [layer.adapters for layer in self.layers if isinstance(layer.adapters, Adapters)]

    def _head_mask(self, head_mask: Tensor, index: int) -> Tensor:
        """The factors of one layer's heads [N]."""
        layers, heads = self.config.num_hidden_layers, self.config.num_attention_heads
        if tuple(head_mask.shape) not in ((heads,), (layers, heads)):
            raise ValueError(f"head_mask has shape {tuple(head_mask.shape)}; give [{heads}] or [{layers}, {heads}]")
        return head_mask if head_mask.dim() == 1 else head_mask[index]

    def _refuse_useless(
        self,
        lang_ids: Tensor | None,
        states: Tensor | None,
        states_mask: Tensor | None,
        past: Cache | None,
        use_cache: bool,
    ) -> None:
        """ValueError for an argument that this model would not use."""
        config = self.config
        if lang_ids is not None and not config.languages:
            raise ValueError(
                f"lang_ids choose among adapters, and a {config.model_type} model has none; leave them out"
            )
        if (use_cache or past is not None) and not config.is_decoder:
            raise ValueError("use_cache and past_key_values are for a decoder; set is_decoder in the config")
        if states is not None and not config.add_cross_attention:
            raise ValueError("encoder_hidden_states need cross-attention; set is_decoder and add_cross_attention")
        if states_mask is not None and states is None:
            raise ValueError("encoder_attention_mask is given without encoder_hidden_states; give both")
        if past is not None and len(past) != config.num_hidden_layers:
            raise ValueError(f"past_key_values are of {len(past)} layers; this model has {config.num_hidden_layers}")
