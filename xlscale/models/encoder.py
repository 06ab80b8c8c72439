"""The encoder of RoBERTa, XLM-R (post-LN) and XLM-R XL/XXL (pre-LN), placed by the family's layout.

Legend: B batch, T tokens, D hidden, N heads (of this rank), H head dim, F width of the feed-forward network.
A module touches its own parameters only: ZeRO-3 gathers them module by module.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlscale.config import ModelConfig
from xlscale.models.families import layout
from xlscale.models.parts import PLAIN, Parts

# As transformers names them.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


class Embeddings(nn.Module):
    """Sum of word, position and token type embeddings, normalised where the family does so."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        D, pad = model.hidden_size, model.pad_token_id
        self.pad_token_id = pad
        self.max_tokens = model.max_position_embeddings - pad - 1
        self.word = parts.vocab_embedding(model.vocab_size, D, pad)
        self.position = nn.Embedding(model.max_position_embeddings, D, padding_idx=pad)
        self.token_type = nn.Embedding(model.type_vocab_size, D)
        self.norm = nn.LayerNorm(D, eps=model.layer_norm_eps) if layout(model).embedding_norm else None
        self.dropout = parts.dropout(model.hidden_dropout_prob, 0)

    def forward(self, input_ids_BT: Tensor) -> Tensor:
        if input_ids_BT.shape[1] > self.max_tokens:
            raise ValueError(
                f"a sequence of {input_ids_BT.shape[1]} tokens is longer than the model's {self.max_tokens}; "
                f"cut it, or raise max_position_embeddings (tokens + {self.pad_token_id + 1})"
            )
        # The first token is at pad + 1 and padding stays at pad; integer kernels, no host sync.
        real_BT = (input_ids_BT != self.pad_token_id).long()
        position_ids_BT = real_BT.cumsum(dim=1) * real_BT + self.pad_token_id
        # Every token is of type 0; added in the order of transformers, for the same rounding.
        embedded_BTD = self.word(input_ids_BT) + self.token_type(torch.zeros_like(input_ids_BT))
        embedded_BTD = embedded_BTD + self.position(position_ids_BT)
        if self.norm is not None:
            embedded_BTD = self.norm(embedded_BTD)
        return self.dropout(embedded_BTD)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens that are not padding."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        D = model.hidden_size
        assert D % model.num_attention_heads == 0, "config.check refuses this"
        self.head_dim = D // model.num_attention_heads
        self.dropout_prob = model.attention_probs_dropout_prob
        self.query = parts.column(D, D)
        self.key = parts.column(D, D)
        self.value = parts.column(D, D)
        self.output = parts.row(D, D)

    def forward(self, hidden_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        B, T, _ = hidden_BTD.shape
        q_BNTH, k_BNTH, v_BNTH = (
            projection(hidden_BTD).view(B, T, -1, self.head_dim).transpose(1, 2)  # -1: this rank's heads
            for projection in (self.query, self.key, self.value)
        )
        context_BNTH = F.scaled_dot_product_attention(
            q_BNTH, k_BNTH, v_BNTH, attn_mask=mask_B11T, dropout_p=self.dropout_prob if self.training else 0.0
        )
        return self.output(context_BNTH.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """The feed-forward network of one layer."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        if model.hidden_act not in ACTIVATIONS:
            raise ValueError(f"hidden_act={model.hidden_act!r} is not known; use one of {sorted(ACTIVATIONS)}")
        self.act = ACTIVATIONS[model.hidden_act]
        self.up = parts.column(model.hidden_size, model.intermediate_size)
        self.down = parts.row(model.intermediate_size, model.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(self.act(self.up(hidden_BTD)))


class Layer(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream after dropout (XL too)."""

    def __init__(self, model: ModelConfig, index: int, parts: Parts):
        super().__init__()
        self.pre_norm = layout(model).pre_norm
        self.attention = Attention(model, parts)
        self.mlp = MLP(model, parts)
        self.attention_norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        self.mlp_norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)
        self.attention_dropout = parts.dropout(model.hidden_dropout_prob, 2 * index + 1)
        self.mlp_dropout = parts.dropout(model.hidden_dropout_prob, 2 * index + 2)

    def forward(self, hidden_BTD: Tensor, mask_B11T: Tensor | None) -> Tensor:
        if self.pre_norm:
            attended_BTD = self.attention(self.attention_norm(hidden_BTD), mask_B11T)
            hidden_BTD = hidden_BTD + self.attention_dropout(attended_BTD)
            return hidden_BTD + self.mlp_dropout(self.mlp(self.mlp_norm(hidden_BTD)))
        attended_BTD = self.attention(hidden_BTD, mask_B11T)
        hidden_BTD = self.attention_norm(hidden_BTD + self.attention_dropout(attended_BTD))
        return self.mlp_norm(hidden_BTD + self.mlp_dropout(self.mlp(hidden_BTD)))


class Encoder(nn.Module):
    """Token ids to hidden states."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__()
        self.embeddings = Embeddings(model, parts)
        self.layers = nn.ModuleList(Layer(model, index, parts) for index in range(model.num_hidden_layers))
        final_norm = layout(model).final_norm
        self.final_norm = nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps) if final_norm else None

    def forward(self, input_ids_BT: Tensor, attention_mask_BT: Tensor | None = None) -> Tensor:
        """Hidden states [B, T, D].

        attention_mask: 1 or True where a token is attended to. None means that nothing is padded, and is
        faster: the fastest attention kernels take no mask.
        """
        mask_B11T = None if attention_mask_BT is None else attention_mask_BT.bool()[:, None, None, :]
        hidden_BTD = self.embeddings(input_ids_BT)
        for layer in self.layers:
            hidden_BTD = layer(hidden_BTD, mask_B11T)
        return hidden_BTD if self.final_norm is None else self.final_norm(hidden_BTD)
