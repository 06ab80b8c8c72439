"""The head of both language models, and the causal one with greedy generation.

Legend: B batch, T tokens, M rows (of whatever shape before the last dimension), D hidden, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.bare import OnEncoder
from xlscale.models.outputs import CausalLMOutput
from xlscale.models.parts import PLAIN, Parts, VocabProjection


class LMHead(nn.Module):
    """dense -> gelu -> LayerNorm -> word embeddings transposed + bias."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        self.decoder = parts.vocab_projection(model.vocab_size)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        # The head's activation is the exact GELU in every family, whatever hidden_act says: as transformers.
        return self.decoder(self.norm(F.gelu(self.dense(hidden_MD))))


class OnEncoderLM(OnEncoder):
    """An encoder and a language model's head with tied word embeddings."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__(model, parts)
        self.head = LMHead(model, parts)
        word = self.encoder.embeddings.word.weight
        assert isinstance(word, nn.Parameter)
        self.head.decoder.weight = word


def mean_loss(decoder: VocabProjection, logits_MV: Tensor, labels_M: Tensor) -> Tensor:
    """Mean cross entropy of the labels that are not -100, fp32; 0, and zero gradients, where all are.

    logits: as the decoder gave them, a part of the vocabulary where it is split.
    """
    labelled_M = labels_M.flatten() != IGNORE
    losses_M, _ = decoder.token_losses(logits_MV.flatten(0, -2), labels_M.flatten().masked_fill(~labelled_M, 0))
    return (losses_M * labelled_M).sum() / labelled_M.sum().clamp(min=1)


class ForCausalLM(OnEncoderLM):
    """Predicts each next token. With is_decoder no token sees a later one; without, all see all, as in transformers."""

    architecture = "ForCausalLM"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> CausalLMOutput:
        """Logits [B, T, V], and with `labels` the loss; all other arguments are Encoder.forward's.

        labels: [B, T] ids, -100 where nothing is predicted; usually input_ids themselves: the shift is made here.
        use_cache: None = as the config says, and not beside labels.
        """
        cache = self.cache_wanted(use_cache if labels is None else bool(use_cache))
        out = self.encoder(input_ids, attention_mask, use_cache=cache, **inputs)
        logits_BTV = self.head(out.last_hidden_state)
        loss = None
        if labels is not None:
            loss = mean_loss(self.head.decoder, logits_BTV, F.pad(labels[:, 1:], (0, 1), value=IGNORE))
        return CausalLMOutput(
            loss,
            self.head.decoder.full_logits(logits_BTV),
            out.past_key_values,
            out.hidden_states,
            out.attentions,
            out.cross_attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        max_new_tokens: int,
        use_cache: bool | None = None,
        **inputs: Any,
    ) -> Tensor:
        """The prompts and their best continuations [B, T + at most max_new_tokens]; the same with and without cache.

        attention_mask: [B, T], 0 on padding, which stands on the left; None = 0 where input_ids are padding.
        inputs: what each step gets besides: lang_ids, encoder_hidden_states and their mask. A row ends with its first
        </s>, padding follows. Positions are those of forward; transformers' generate() counts them from 0 for most
        families, against its own forward, and so finds other tokens. The model should be in evaluation mode; under
        ZeRO-3 all ranks need the same number of steps. ValueError for a model that sees later tokens, for prompts
        padded on the right and for more tokens than there are positions.
        """
        pad, eos, longest = self.config.pad_token_id, self.config.eos_token_id, self.encoder.embeddings.max_tokens
        B, T = input_ids.shape
        mask_BT = (input_ids != pad).long() if attention_mask is None else attention_mask.long()
        if not self.config.is_decoder:
            raise ValueError("is_decoder = false: each token sees the later ones; set is_decoder = true to generate")
        if not mask_BT[:, -1].all():
            raise ValueError("a prompt ends with padding, where its next token would stand; pad on the left")
        if T + max_new_tokens > longest:
            raise ValueError(
                f"{T} tokens and max_new_tokens={max_new_tokens} are more than the model's {longest}; "
                f"use at most {longest - T}"
            )
        cache = self.cache_wanted(use_cache)
        padded = not bool(mask_BT.all())
        ids_BT, past, done_B = input_ids, None, torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        for _ in range(max_new_tokens):
            # By the tokens so far, not by the cache's length, in which padding counts.
            real_BT = (ids_BT != pad).long()
            positions_BT = real_BT.cumsum(1) * real_BT + pad
            fresh = slice(None) if past is None else slice(-1, None)
            out = self(
                ids_BT[:, fresh],
                mask_BT if padded else None,
                position_ids=positions_BT[:, fresh],
                past_key_values=past,
                use_cache=cache,
                **inputs,
            )
            past = out.past_key_values
            next_B = out.logits[:, -1].argmax(-1).masked_fill(done_B, pad)
            ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
            mask_BT = F.pad(mask_BT, (0, 1), value=1)
            done_B = done_B | (next_B == eos)
            if done_B.all():
                break
        return ids_BT
