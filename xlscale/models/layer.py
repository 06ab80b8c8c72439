"""One layer of the encoder: pre- or post-LN, with or without cross-attention and adapters.

Legend: B batch, T tokens, K keys, D hidden, N heads, F width of the feed-forward network.
"""

from typing import NamedTuple

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xlscale.config_sections import ModelConfig
from xlscale.models.adapters import Adapters, Routing
from xlscale.models.attention import Attention, Mask
from xlscale.models.families import layout
from xlscale.models.parts import Parts, activation


class MLP(nn.Module):
    """The feed-forward network of one layer."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        self.act, self.into_columns = activation(model.hidden_act), parts.into_columns
        self.up = parts.column(model.hidden_size, model.intermediate_size)
        self.down = parts.row(model.intermediate_size, model.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self.down(self.act(self.up(self.into_columns(hidden_BTD))))
        return output_BTD


class LayerInput(NamedTuple):
    """What a layer needs besides the hidden states, the same for all layers but for cache and head mask."""

    mask: Mask
    routing: Routing | None = None
    states_BKD: Tensor | None = None
    cross_mask: Mask = Mask()
    past: tuple[Tensor, ...] | None = None
    use_cache: bool = False
    head_mask_N: Tensor | None = None
    output_attentions: bool = False


class LayerOutput(NamedTuple):
    hidden_BTD: Tensor
    cached: tuple[Tensor, ...] | None
    weights_BNTK: Tensor | None
    cross_weights_BNTK: Tensor | None


class Layer(nn.Module):
    """Attention, cross-attention in a decoder, feed-forward network and adapter, each added to the residual stream
    after dropout (XL too)."""

    def __init__(self, model: ModelConfig, index: int, parts: Parts):
        super().__init__()
        layers, p = model.num_hidden_layers, model.hidden_dropout_prob

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(model.hidden_size, eps=model.layer_norm_eps)

        self.pre_norm = layout(model).pre_norm
        self.attention = Attention(model, parts, index)
        self.mlp = MLP(model, parts)
        self.attention_norm = norm()
        self.mlp_norm = norm()
        self.attention_dropout = parts.dropout(p, 2 * index + 1)
        self.mlp_dropout = parts.dropout(p, 2 * index + 2)
        # What not every family has is numbered after what all have.
        if model.languages:
            self.adapter_norm = norm() if model.adapter_layer_norm else None
            self.adapters = Adapters(model, parts)
            self.adapter_dropout = parts.dropout(p, 2 * layers + 1 + index)
            self.reuse_norm, self.norm_first = model.adapter_reuse_layer_norm, model.ln_before_adapter
        if model.add_cross_attention:
            self.cross_attention = Attention(model, parts, layers + index, cross=True)
            self.cross_attention_norm = norm()
            self.cross_attention_dropout = parts.dropout(p, 3 * layers + 1 + index)

    def forward(self, hidden_BTD: Tensor, given: LayerInput) -> LayerOutput:
        """One layer; `given` holds no tensor that needs a gradient but `states` (ZeRO-3 looks at `hidden` only)."""
        past = given.past
        attended = self.attention(
            self.attention_norm(hidden_BTD) if self.pre_norm else hidden_BTD,
            given.mask,
            None,
            None if past is None else past[:2],
            given.use_cache,
            given.head_mask_N,
            given.output_attentions,
        )
        hidden_BTD = hidden_BTD + self.attention_dropout(attended.hidden_BTD)
        if not self.pre_norm:
            hidden_BTD = self.attention_norm(hidden_BTD)
        cached, cross_weights_BNTK = attended.cached, None

        if given.states_BKD is not None:
            crossed = self.cross_attention(
                self.cross_attention_norm(hidden_BTD) if self.pre_norm else hidden_BTD,
                given.cross_mask,
                given.states_BKD,
                past[2:] if past is not None and len(past) == 4 else None,
                given.use_cache,
                given.head_mask_N,
                given.output_attentions,
            )
            hidden_BTD = hidden_BTD + self.cross_attention_dropout(crossed.hidden_BTD)
            if not self.pre_norm:
                hidden_BTD = self.cross_attention_norm(hidden_BTD)
            cached = None if cached is None else (*cached, *crossed.cached)
            cross_weights_BNTK = crossed.weights_BNTK

        mlp_BTD = self.mlp(self.mlp_norm(hidden_BTD) if self.pre_norm else hidden_BTD)
        hidden_BTD = hidden_BTD + self.mlp_dropout(mlp_BTD)
        if given.routing is not None:
            hidden_BTD = self._adapt(hidden_BTD, given.routing)
        if not self.pre_norm:
            hidden_BTD = self.mlp_norm(hidden_BTD)
        return LayerOutput(hidden_BTD, cached, attended.weights_BNTK, cross_weights_BNTK)

    def _adapt(self, hidden_BTD: Tensor, routing: Routing) -> Tensor:
        """The adapter and its residual; the norm before it is the adapters' own, the feed-forward network's, or none.

        In xmod-base the feed-forward network's LayerNorm runs here and once more after it: so it was trained.
        """
        residual_BTD = hidden_BTD
        if self.adapter_norm is not None:
            hidden_BTD = self.adapter_norm(hidden_BTD)
        elif self.reuse_norm:
            hidden_BTD = self.mlp_norm(hidden_BTD)
        if self.norm_first:
            residual_BTD = hidden_BTD
        adapted_BTD: Tensor = self.adapter_dropout(self.adapters(hidden_BTD, routing))
        return adapted_BTD + residual_BTD


def recomputed(layer: nn.Module, hidden_BTD: Tensor, given: LayerInput) -> LayerOutput:
    """What the layer gives, keeping only its input: the backward pass runs it again, with the same noise."""

    def run(hidden_BTD: Tensor, states_BKD: Tensor | None) -> Tensor:
        output: LayerOutput = layer(hidden_BTD, given._replace(states_BKD=states_BKD))
        return output.hidden_BTD

    # The other kind (use_reentrant=False) goes wrong under ZeRO-3 of deepspeed 0.19.8: what is computed again has its
    # weights released before the backward pass needs them, and the early stop that hides this leaves entries on the
    # engine's stack of modules, three a layer and micro-step. This kind gives gradients only where the input has one,
    # so the encoder asks for that.
    output_BTD = checkpoint(run, hidden_BTD, given.states_BKD, use_reentrant=True)
    return LayerOutput(output_BTD, None, None, None)
