"""Attention of every kind: to the same tokens or to another encoder's, both ways or causal, cached, by distance.

Legend: B batch, T queries, K keys, D hidden, N heads (of this rank), H head dim, R distances.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.models.parts import Parts

KeysValues = tuple[Tensor, Tensor]
"""Keys and values [B, N, K, H] of one attention."""


class Mask(NamedTuple):
    """Which keys a query attends to."""

    allowed: Tensor | None = None
    """Bool, broadcast to [B, N, T, K]; None = all, so that the fastest kernels can run."""
    causal: bool = False
    """A query attends to its own and earlier keys only, and nothing is cached; never together with `allowed`."""


class AttentionOutput(NamedTuple):
    hidden_BTD: Tensor
    weights_BNTK: Tensor | None
    """What every head gives to every key, when asked for."""
    cached: KeysValues | None
    """Keys and values up to now, when asked for."""


def self_mask(
    attention_mask: Tensor | None, batch: int, tokens: int, past: int, causal: bool, device: torch.device
) -> Mask:
    """The mask of self-attention from what the caller gives; `past` keys are cached before these `tokens`.

    attention_mask: 1 or True where a key is attended to, [B, past + T], or [B, T, past + T], which stands as it is: a
    decoder's causal mask is then the caller's, as in transformers. ValueError for another shape.
    """
    keys = past + tokens
    if attention_mask is not None and attention_mask.dim() == 3:
        return Mask(_checked("attention_mask", attention_mask, (batch, tokens, keys))[:, None])
    allowed = None
    if attention_mask is not None:
        allowed = _checked("attention_mask", attention_mask, (batch, keys))[:, None, None]
    if not causal or tokens == 1:  # one query is the last token, which sees all
        return Mask(allowed)
    if allowed is None and past == 0:
        return Mask(causal=True)
    earlier_TK = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(past)
    return Mask(earlier_TK[None, None] if allowed is None else allowed & earlier_TK)


def cross_mask(encoder_attention_mask: Tensor | None, batch: int, tokens: int, keys: int) -> Mask:
    """The mask of cross-attention: [B, K] or [B, T, K]; ValueError for another shape."""
    if encoder_attention_mask is None:
        return Mask()
    if encoder_attention_mask.dim() == 3:
        return Mask(_checked("encoder_attention_mask", encoder_attention_mask, (batch, tokens, keys))[:, None])
    return Mask(_checked("encoder_attention_mask", encoder_attention_mask, (batch, keys))[:, None, None])


def _checked(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if tuple(mask.shape) != shape:
        want = list(shape) if len(shape) == 3 else f"{list(shape)}, or one row of keys for each query"
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; these inputs need {want}, cached tokens included")
    return mask.bool()


class Attention(nn.Module):
    """Multi-head attention, with distances between query and key where the config says so.

    Query, key and value are three products: one of three times the width is not faster at real widths
    (tests/benchmarks/results/fused_qkv.md). What they share is their entry.
    """

    def __init__(self, model: ModelConfig, parts: Parts, site: int, cross: bool = False):
        super().__init__()
        D = model.hidden_size
        assert D % model.num_attention_heads == 0, "config.check refuses this"
        self.head_dim = D // model.num_attention_heads
        self.dropout_prob = model.attention_probs_dropout_prob
        self.cross, self.site, self.seeded = cross, site, parts.seeded_attention
        self.into_columns, self.into_split = parts.into_columns, parts.into_split
        self.query = parts.column(D, D)
        self.key = parts.column(D, D)
        self.value = parts.column(D, D)
        self.output = parts.row(D, D)
        # Cross-attention has no distances in any family.
        self.positions = "absolute" if cross else model.position_embedding_type
        if self.positions != "absolute":
            self.max_positions = model.max_position_embeddings
            self.distance = nn.Embedding(2 * self.max_positions - 1, self.head_dim)

    def forward(
        self,
        hidden_BTD: Tensor,
        mask: Mask,
        states_BKD: Tensor | None = None,
        past: KeysValues | None = None,
        use_cache: bool = False,
        head_mask_N: Tensor | None = None,
        output_weights: bool = False,
    ) -> AttentionOutput:
        """`hidden` after attention to itself, or, with cross-attention, to `states`.

        past: cached keys and values; self-attention puts them before the new ones, cross-attention uses them alone.
        head_mask: factor of each head. output_weights: give the weights too, at the cost of the fast kernels.
        """
        entered = self.into_columns(hidden_BTD)
        q_BNTH = self._heads(self.query(entered))
        if self.cross and past is not None:
            k_BNKH, v_BNKH = past
        else:
            if states_BKD is not None:
                entered = self.into_split(states_BKD)
            k_BNKH, v_BNKH = self._heads(self.key(entered)), self._heads(self.value(entered))
            if past is not None:
                k_BNKH, v_BNKH = torch.cat([past[0], k_BNKH], dim=2), torch.cat([past[1], v_BNKH], dim=2)
        dropout = self.dropout_prob if self.training else 0.0
        bias_BNTK = None if self.positions == "absolute" else self._distance_scores(q_BNTH, k_BNKH)
        weights_BNTK = None
        with self.seeded(self.site) if dropout else nullcontext():
            if output_weights:
                weights_BNTK = F.dropout(_weights(q_BNTH, k_BNKH, bias_BNTK, mask), dropout)
                context_BNTH = weights_BNTK @ v_BNKH
            else:
                allowed, causal = mask
                if bias_BNTK is not None:
                    allowed, causal = _masked(bias_BNTK, mask, -math.inf), False
                context_BNTH = F.scaled_dot_product_attention(
                    q_BNTH, k_BNKH, v_BNKH, attn_mask=allowed, dropout_p=dropout, is_causal=causal
                )
        if head_mask_N is not None:
            factor_N11 = self._of_my_heads(head_mask_N, q_BNTH.shape[1]).to(context_BNTH.dtype)[:, None, None]
            context_BNTH = context_BNTH * factor_N11
            weights_BNTK = None if weights_BNTK is None else weights_BNTK * factor_N11
        hidden_BTD = self.output(context_BNTH.transpose(1, 2).flatten(2))
        return AttentionOutput(hidden_BTD, weights_BNTK, (k_BNKH, v_BNKH) if use_cache else None)

    def _heads(self, projected_BTD: Tensor) -> Tensor:
        # -1: this rank's heads
        return projected_BTD.view(*projected_BTD.shape[:2], -1, self.head_dim).transpose(1, 2)

    def _distance_scores(self, q_BNTH: Tensor, k_BNKH: Tensor) -> Tensor:
        """What the distance of query and key adds to their score, scaled as the score is (Shaw et al. 2018)."""
        T, K = q_BNTH.shape[2], k_BNKH.shape[2]
        # Distances from -(T-1), the first query to the last key, to K-1, the last query to the first key.
        embedded_RH = self.distance(
            torch.arange(self.max_positions - T, self.max_positions + K - 1, device=q_BNTH.device)
        )
        embedded_RH = self.into_split(embedded_RH).to(q_BNTH.dtype) / math.sqrt(self.head_dim)
        t_T = torch.arange(T, device=q_BNTH.device)
        # Row r of embedded is the distance r - (T-1); query t stands at K-T+t.
        r_TK = (K - 1 + t_T)[:, None] - torch.arange(K, device=q_BNTH.device)
        B, N = q_BNTH.shape[:2]
        scores_BNTK = (q_BNTH @ embedded_RH.T).gather(3, r_TK.expand(B, N, T, K))
        if self.positions == "relative_key_query":
            by_key_BNKT = (k_BNKH @ embedded_RH.T).gather(3, r_TK.T.expand(B, N, K, T))
            scores_BNTK = scores_BNTK + by_key_BNKT.transpose(2, 3)
        return scores_BNTK

    @staticmethod
    def _of_my_heads(head_mask_N: Tensor, heads: int) -> Tensor:
        if head_mask_N.shape[0] != heads:
            raise ValueError(
                f"head_mask has {head_mask_N.shape[0]} heads and this process {heads}; give one factor for each head, "
                "and none under tensor parallelism"
            )
        return head_mask_N


def _masked(scores_BNTK: Tensor, mask: Mask, low: float) -> Tensor:
    """Scores with `low` where a query may not look."""
    allowed = mask.allowed
    if mask.causal:
        allowed = torch.ones(scores_BNTK.shape[2:], dtype=torch.bool, device=scores_BNTK.device).tril()
    return scores_BNTK if allowed is None else scores_BNTK.masked_fill(~allowed, low)


def _weights(q_BNTH: Tensor, k_BNKH: Tensor, bias_BNTK: Tensor | None, mask: Mask) -> Tensor:
    """Softmax of the scores; a query that may look nowhere gives zeros, as the fused kernels."""
    scores_BNTK = (q_BNTH @ k_BNKH.transpose(2, 3)) / math.sqrt(q_BNTH.shape[3])
    if bias_BNTK is not None:
        scores_BNTK = scores_BNTK + bias_BNTK
    weights_BNTK = _masked(scores_BNTK, mask, torch.finfo(scores_BNTK.dtype).min).softmax(dim=-1)
    return _masked(weights_BNTK, mask, 0.0)
