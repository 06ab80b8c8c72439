"""The published shapes as data, and what follows from a shape without building it: layout, tensors, count."""

import math
from dataclasses import dataclass
from typing import Any

from xlscale.config import ModelConfig


@dataclass(frozen=True)
class Layout:
    """Where a family has its LayerNorms."""

    pre_norm: bool
    """A sublayer normalises its input (True), or the sum of its input and output (False: post-LN)."""
    embedding_norm: bool
    """A LayerNorm follows the sum of the embeddings."""
    final_norm: bool
    """A LayerNorm follows the last layer."""


LAYOUTS = {
    "roberta": Layout(pre_norm=False, embedding_norm=True, final_norm=False),
    "xlm-roberta": Layout(pre_norm=False, embedding_norm=True, final_norm=False),
    "xlm-roberta-xl": Layout(pre_norm=True, embedding_norm=False, final_norm=True),
}

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_XL = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 10240}
_XXL = {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 16384}

# RoBERTa: Liu et al. 2019; XLM-R: Conneau et al. 2020; XL and XXL: Goyal et al. 2021. All else by default.
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": {"model_type": "roberta", "vocab_size": 50265, **_BASE},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50265, **_LARGE},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **_BASE},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "vocab_size": 250002, **_LARGE},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_XL},
    "xlm-roberta-xxl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_XXL},
}

Leaves = dict[str, tuple[int, ...]]  # parameter of a module -> its shape


def preset(name: str, **changes: Any) -> ModelConfig:
    """The published shape `name`, with some fields changed; an unknown name is a ValueError."""
    if name not in PRESETS:
        raise ValueError(f"{name!r} is not a published shape; use one of {sorted(PRESETS)}")
    return ModelConfig(**{**PRESETS[name], **changes})


def layout(model: ModelConfig) -> Layout:
    """The LayerNorm placement of a model's family; an unknown family is a ValueError."""
    if model.model_type not in LAYOUTS:
        raise ValueError(f"model_type={model.model_type!r} is not a family; use one of {sorted(LAYOUTS)}")
    return LAYOUTS[model.model_type]


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the masked LM, as the model registers them, the tied one once."""
    V, D, F = model.vocab_size, model.hidden_size, model.intermediate_size
    placed = layout(model)
    norm: Leaves = {"weight": (D,), "bias": (D,)}

    def linear(fan_in: int, fan_out: int) -> Leaves:
        return {"weight": (fan_out, fan_in), "bias": (fan_out,)}

    modules: dict[str, Leaves] = {
        "encoder.embeddings.word": {"weight": (V, D)},
        "encoder.embeddings.position": {"weight": (model.max_position_embeddings, D)},
        "encoder.embeddings.token_type": {"weight": (model.type_vocab_size, D)},
    }
    if placed.embedding_norm:
        modules["encoder.embeddings.norm"] = norm
    for n in range(model.num_hidden_layers):
        layer = f"encoder.layers.{n}"
        for projection in ("query", "key", "value", "output"):
            modules[f"{layer}.attention.{projection}"] = linear(D, D)
        modules[f"{layer}.mlp.up"] = linear(D, F)
        modules[f"{layer}.mlp.down"] = linear(F, D)
        modules[f"{layer}.attention_norm"] = norm
        modules[f"{layer}.mlp_norm"] = norm
    if placed.final_norm:
        modules["encoder.final_norm"] = norm
    modules["head.dense"] = linear(D, D)
    modules["head.norm"] = norm
    modules["head.decoder"] = {"bias": (V,)}  # its weight is the word embedding's
    return {f"{module}.{leaf}": shape for module, leaves in modules.items() for leaf, shape in leaves.items()}


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters of the masked LM, the tied weight counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
