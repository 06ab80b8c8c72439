"""The rules of [model], as those of config_rules.py."""

import re
from typing import Any

from xlscale.config_rules_data import Rule
from xlscale.config_values import divisors, multiples, toml_value


def _heads(hidden: int, heads: int) -> str | None:
    if hidden % heads == 0:
        return None
    return (
        f"model.num_attention_heads = {heads} must divide hidden_size = {hidden}; "
        f"use one of {divisors(hidden)} or a hidden_size of {multiples(hidden, heads)}"
    )


def _positions(length: int, positions: int, pad: int) -> str | None:
    room = positions - pad - 1
    if length <= room:
        return None
    return (
        f"data.sequence_length = {length} is more than the {room} tokens of max_position_embeddings = "
        f"{positions}; use {room} or less, or model.max_position_embeddings = {length + pad + 1}"
    )


def _special_ids(vocab: int, pad: int, bos: int, eos: int) -> str | None:
    if len({pad, bos, eos}) == 3 and max(pad, bos, eos) < vocab:
        return None
    return (
        f"model.pad_token_id = {pad}, bos_token_id = {bos}, eos_token_id = {eos} must be three ids below "
        f"vocab_size = {vocab}; use 1, 0 and 2 as all published models"
    )


def _cross_attention(added: bool, decoder: bool) -> str | None:
    if decoder or not added:
        return None
    return "model.add_cross_attention = true is for decoders only; set is_decoder = true"


# What only a model with adapters has -> its value in all other families.
XMOD_ONLY: dict[str, Any] = {
    "languages": [],
    "default_language": "",
    "pre_norm": False,
    "adapter_reduction_factor": 2,
    "adapter_layer_norm": False,
    "adapter_reuse_layer_norm": True,
    "ln_before_adapter": True,
}


def _xmod_only(family: str, *values: Any) -> str | None:
    given = zip(XMOD_ONLY.items(), values, strict=True)
    wrong = [f"model.{name} = {toml_value(value)}" for (name, usual), value in given if value != usual]
    if family == "xmod" or not wrong:
        return None
    return f'{" and ".join(wrong)} is for model_type = "xmod" only; leave it out'


def _adapters(family: str, languages: list[str], default: str, hidden: int, factor: int) -> str | None:
    if family != "xmod":
        return None
    if factor > hidden:
        return f"model.adapter_reduction_factor = {factor} is more than hidden_size = {hidden}; use 2 or 4"
    if not languages:
        return 'model.languages = [] gives no adapter; name the languages, as ["en_XX", "de_DE"]'
    wrong = [code for code in languages if not re.fullmatch(r"[a-z]{2,3}_[A-Z][A-Za-z]+", code)]
    if wrong:  # a code becomes the name of a module: `pop` or a dot would break it
        return f"model.languages: {toml_value(wrong[0])} is not a code; codes look like en_XX, de_DE or bn_Latn"
    twice = sorted({code for code in languages if languages.count(code) > 1})
    if twice:
        return f"model.languages names {', '.join(twice)} more than once; name each language once"
    if default and default not in languages:
        return f'model.default_language = "{default}" has no adapter; use one of {", ".join(languages)} or ""'
    return None


def _adapter_width(family: str, hidden: int, factor: int, tp: int) -> str | None:
    if family != "xmod" or hidden // factor % tp == 0:
        return None
    good = [number for number in (2, 4, 8, 1) if hidden // number and hidden // number % tp == 0]
    return (
        f"model.adapter_reduction_factor = {factor} makes adapters {hidden // factor} wide, "
        f"which parallel.tensor_parallel = {tp} must divide; use one of {good}"
    )


def _labels(count: int, names: dict[str, str]) -> str | None:
    if not names or names.keys() == {str(number) for number in range(count)}:
        return None
    return (
        f"model.id2label has the keys {', '.join(names)}, not those of num_labels = {count} classes; "
        f'name "0" to "{count - 1}", or leave it out'
    )


MODEL_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("model.hidden_size", "model.num_attention_heads"), _heads),
    (("data.sequence_length", "model.max_position_embeddings", "model.pad_token_id"), _positions),
    (("model.vocab_size", "model.pad_token_id", "model.bos_token_id", "model.eos_token_id"), _special_ids),
    (("model.add_cross_attention", "model.is_decoder"), _cross_attention),
    (("model.model_type", *(f"model.{name}" for name in XMOD_ONLY)), _xmod_only),
    (
        (
            "model.model_type",
            "model.languages",
            "model.default_language",
            "model.hidden_size",
            "model.adapter_reduction_factor",
        ),
        _adapters,
    ),
    (
        ("model.model_type", "model.hidden_size", "model.adapter_reduction_factor", "parallel.tensor_parallel"),
        _adapter_width,
    ),
    (("model.num_labels", "model.id2label"), _labels),
)
