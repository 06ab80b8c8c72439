"""The published shapes as data, and what follows from a shape without building it: layout, tensors, count."""

import math
from dataclasses import dataclass
from typing import Any

from xlscale.config_sections import ModelConfig


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
    "xmod": Layout(pre_norm=False, embedding_norm=True, final_norm=False),
}
# The one choice that a config can make: xmod with pre_norm.
XMOD_PRE_NORM = Layout(pre_norm=True, embedding_norm=True, final_norm=True)

_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
_XL = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "intermediate_size": 10240}
_XXL = {"hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 32, "intermediate_size": 16384}

# The languages of X-MOD. A folder brings a list of its own, and the ids are places in that.
XMOD_LANGUAGES = [
    "en_XX", "id_ID", "vi_VN", "ru_RU", "fa_IR", "sv_SE", "ja_XX", "fr_XX", "de_DE", "ro_RO", "ko_KR", "hu_HU",
    "es_XX", "fi_FI", "uk_UA", "da_DK", "pt_XX", "no_XX", "th_TH", "pl_PL", "bg_BG", "nl_XX", "zh_CN", "he_IL",
    "el_GR", "it_IT", "sk_SK", "hr_HR", "tr_TR", "ar_AR", "cs_CZ", "lt_LT", "hi_IN", "zh_TW", "ca_ES", "ms_MY",
    "sl_SI", "lv_LV", "ta_IN", "bn_IN", "et_EE", "az_AZ", "sq_AL", "sr_RS", "kk_KZ", "ka_GE", "tl_XX", "ur_PK",
    "is_IS", "hy_AM", "ml_IN", "mk_MK", "be_BY", "la_VA", "te_IN", "eu_ES", "gl_ES", "mn_MN", "kn_IN", "ne_NP",
    "sw_KE", "si_LK", "mr_IN", "af_ZA", "gu_IN", "cy_GB", "eo_EO", "km_KH", "ky_KG", "uz_UZ", "ps_AF", "pa_IN",
    "ga_IE", "ha_NG", "am_ET", "lo_LA", "ku_TR", "so_SO", "my_MM", "or_IN", "sa_IN",
]  # fmt: skip
_XMOD = {"model_type": "xmod", "vocab_size": 250002, "languages": XMOD_LANGUAGES}
_XMOD_PRE_NORM = {"pre_norm": True, "adapter_layer_norm": True, "ln_before_adapter": False}

# RoBERTa: Liu et al. 2019; XLM-R: Conneau et al. 2020; XL and XXL: Goyal et al. 2021;
# X-MOD: Pfeiffer et al. 2022. All else by default.
PRESETS: dict[str, dict[str, Any]] = {
    "roberta-base": {"model_type": "roberta", "vocab_size": 50265, **_BASE},
    "roberta-large": {"model_type": "roberta", "vocab_size": 50265, **_LARGE},
    "xlm-roberta-base": {"model_type": "xlm-roberta", "vocab_size": 250002, **_BASE},
    "xlm-roberta-large": {"model_type": "xlm-roberta", "vocab_size": 250002, **_LARGE},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_XL},
    "xlm-roberta-xxl": {"model_type": "xlm-roberta-xl", "vocab_size": 250880, **_XXL},
    "xmod-base": {**_XMOD, **_BASE},
    "xmod-large-prenorm": {**_XMOD, **_LARGE, **_XMOD_PRE_NORM, "adapter_reduction_factor": 4},
    # Ours: no paper trained it. The embedding LayerNorm, which XL has not, lets transformers' XmodModel load it.
    "xmod-xl": {**_XMOD, **_XL, **_XMOD_PRE_NORM, "vocab_size": 250880},
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
    return XMOD_PRE_NORM if model.model_type == "xmod" and model.pre_norm else LAYOUTS[model.model_type]


def encoder_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the encoder, as a model with a head registers them."""
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
        if model.position_embedding_type != "absolute":
            distances = 2 * model.max_position_embeddings - 1
            modules[f"{layer}.attention.distance"] = {"weight": (distances, D // model.num_attention_heads)}
        modules[f"{layer}.mlp.up"] = linear(D, F)
        modules[f"{layer}.mlp.down"] = linear(F, D)
        modules[f"{layer}.attention_norm"] = norm
        modules[f"{layer}.mlp_norm"] = norm
        if model.languages and model.adapter_layer_norm:
            modules[f"{layer}.adapter_norm"] = norm
        for language in model.languages:
            width = D // model.adapter_reduction_factor
            modules[f"{layer}.adapters.{language}.down"] = linear(D, width)
            modules[f"{layer}.adapters.{language}.up"] = linear(width, D)
        if model.add_cross_attention:
            for projection in ("query", "key", "value", "output"):
                modules[f"{layer}.cross_attention.{projection}"] = linear(D, D)
            modules[f"{layer}.cross_attention_norm"] = norm
    if placed.final_norm:
        modules["encoder.final_norm"] = norm
    return {f"{module}.{leaf}": shape for module, leaves in modules.items() for leaf, shape in leaves.items()}


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The same of the whole masked LM, the tied one once."""
    D = model.hidden_size
    head = {
        "head.dense.weight": (D, D),
        "head.dense.bias": (D,),
        "head.norm.weight": (D,),
        "head.norm.bias": (D,),
        "head.decoder.bias": (model.vocab_size,),  # its weight is the word embedding's
    }
    return encoder_shapes(model) | head


def parameter_count(model: ModelConfig) -> int:
    """Number of parameters of the masked LM, the tied weight counted once."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
