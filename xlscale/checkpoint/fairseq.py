"""The model.pt of fairseq (RoBERTa, XLM-R, XL, X-MOD): its names, and the config that its tensors and settings tell."""

from argparse import Namespace
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from xlscale.checkpoint.hub_config import TOKENIZER_FILES
from xlscale.checkpoint.hub_names import filled, wildcards
from xlscale.checkpoint.weights import Weights
from xlscale.config_rules import broken_rules
from xlscale.config_sections import ModelConfig
from xlscale.config_values import TYPE_NAMES, exact, fits

# Our module -> fairseq's, with N for a layer and L for a language.
FAIRSEQ_NAMES = {
    "encoder.embeddings.word": "sentence_encoder.embed_tokens",
    "encoder.embeddings.position": "sentence_encoder.embed_positions",
    "encoder.embeddings.norm": "sentence_encoder.layernorm_embedding",
    "encoder.layers.N.attention.query": "sentence_encoder.layers.N.self_attn.q_proj",
    "encoder.layers.N.attention.key": "sentence_encoder.layers.N.self_attn.k_proj",
    "encoder.layers.N.attention.value": "sentence_encoder.layers.N.self_attn.v_proj",
    "encoder.layers.N.attention.output": "sentence_encoder.layers.N.self_attn.out_proj",
    "encoder.layers.N.attention_norm": "sentence_encoder.layers.N.self_attn_layer_norm",
    "encoder.layers.N.mlp.up": "sentence_encoder.layers.N.fc1",
    "encoder.layers.N.mlp.down": "sentence_encoder.layers.N.fc2",
    "encoder.layers.N.mlp_norm": "sentence_encoder.layers.N.final_layer_norm",
    "encoder.layers.N.adapter_norm": "sentence_encoder.layers.N.adapter_layer_norm",
    "encoder.layers.N.adapters.L.down": "sentence_encoder.layers.N.adapter_modules.L.fc1",
    "encoder.layers.N.adapters.L.up": "sentence_encoder.layers.N.adapter_modules.L.fc2",
    "encoder.final_norm": "sentence_encoder.layer_norm",
    "head.dense": "lm_head.dense",
    "head.norm": "lm_head.layer_norm",
    "head.decoder": "lm_head",
}
WORD, DECODER = "sentence_encoder.embed_tokens.weight", "lm_head.weight"
"""The decoder's weight stands there a second time; it must be the word embedding's."""
FUSED = ("q_proj", "k_proj", "v_proj")
"""Of 2019's files: one matrix, in_proj, holds the three below each other."""
BUFFERS = (".version", "._float_tensor")


class Place(NamedTuple):
    """Where a parameter stands: tensor `name`, of which it is part number `part` of `parts` along dimension 0."""

    name: str
    part: int = 0
    parts: int = 1


def places(names: list[str], weights: Weights) -> dict[str, Place]:
    """Our name -> its place in a fairseq file, for those that are there."""
    held = canonical(weights)
    found = {}
    for ours in names:
        module, leaf = ours.rsplit(".", 1)
        row, values = wildcards(module)
        if row not in FAIRSEQ_NAMES:
            continue
        theirs = filled(FAIRSEQ_NAMES[row], values)
        stem, _, projection = theirs.rpartition(".")
        fused = f"{stem}.in_proj_{leaf}"
        if f"{theirs}.{leaf}" in held:
            found[ours] = Place(held[f"{theirs}.{leaf}"])
        elif projection in FUSED and fused in held:
            found[ours] = Place(held[fused], FUSED.index(projection), len(FUSED))
    return found


def canonical(weights: Weights) -> dict[str, str]:
    """Name as of fairseq's last version, without `encoder.` -> the name in the file, buffers left out."""
    names = {}
    for name in weights.held:
        if not name.endswith(BUFFERS):
            plain = name.removeprefix("decoder.").removeprefix("encoder.")
            names[plain.replace("sentence_encoder.emb_layer_norm.", "sentence_encoder.layernorm_embedding.")] = name
    return names


def fairseq_config(weights: Weights) -> ModelConfig:
    """The config of a fairseq file: sizes by its tensors, the rest by its settings; ValueError where they disagree."""
    told = _settings(weights)
    held = canonical(weights)
    sizes = {name: weights.shape(file_name) for name, file_name in held.items()}
    try:
        vocab, hidden = sizes[WORD]
        positions = sizes["sentence_encoder.embed_positions.weight"][0]
        inner = sizes["sentence_encoder.layers.0.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{weights.where} is not fairseq's RoBERTa, XLM-R or X-MOD: {error} is wrong or missing"
        ) from None
    layers = {name.split(".")[2] for name in sizes if name.startswith("sentence_encoder.layers.")}
    adapters = [name.split(".")[4] for name in sizes if name.startswith("sentence_encoder.layers.0.adapter_modules.")]
    final_norm = "sentence_encoder.layer_norm.weight" in sizes
    values: dict[str, Any] = {
        "model_type": _family(weights, bool(adapters), final_norm),
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": len(layers),
        "num_attention_heads": told.get("encoder_attention_heads"),
        "intermediate_size": inner,
        "max_position_embeddings": positions,
        "hidden_dropout_prob": told.get("dropout", 0.1),
        "attention_probs_dropout_prob": told.get("attention_dropout", 0.1),
    }
    if adapters:
        values |= {
            "languages": told.get("languages") or list(dict.fromkeys(adapters)),
            "pre_norm": final_norm,
            "adapter_reduction_factor": told.get("bottleneck", 2),
            "adapter_layer_norm": told.get("adapter_layer_norm", False),
            "adapter_reuse_layer_norm": told.get("adapter_reuse_layer_norm", True),
            "ln_before_adapter": told.get("ln_before_adapter", True),
        }
    problems = [
        f"{name}={told[name]!r} but its tensors have {found!r}"
        for name, found in (
            ("encoder_embed_dim", hidden),
            ("encoder_ffn_embed_dim", inner),
            ("encoder_layers", len(layers)),
            ("encoder_normalize_before", final_norm),
            ("activation_fn", "gelu"),
        )
        if name in told and told[name] != found
    ]
    kinds = get_type_hints(ModelConfig)
    problems += [
        f"{name}={value!r} must be {TYPE_NAMES[kinds[name]]}"
        for name, value in values.items()
        if not fits(value, kinds[name])
    ]
    if not problems:
        values = {name: exact(value, kinds[name]) for name, value in values.items()}
        problems = [line for _, line in broken_rules({f"model.{name}": value for name, value in values.items()})]
    if problems:
        raise ValueError(f"{weights.where}: {'; '.join(problems)}; put a config.json that is right beside it")
    return ModelConfig(**values)


def _settings(weights: Weights) -> dict[str, Any]:
    """fairseq's own settings of the model, from either of the two places where its versions keep them."""
    extra = weights.fairseq or {}
    configured = extra.get("cfg")
    for found in (configured.get("model") if isinstance(configured, Mapping) else None, extra.get("args")):
        if isinstance(found, Namespace):
            return vars(found)
        if isinstance(found, Mapping):
            return {str(key): value for key, value in found.items()}
    raise ValueError(
        f"{weights.where} has no args and no cfg that say how many heads it has; put a config.json beside it"
    )


def _family(weights: Weights, adapters: bool, final_norm: bool) -> str:
    if adapters:
        return "xmod"
    if final_norm:
        return "xlm-roberta-xl"
    folder = weights.where if weights.where.is_dir() else weights.where.parent
    sentencepiece = folder / TOKENIZER_FILES["XLMRobertaTokenizer"][0]
    return "xlm-roberta" if sentencepiece.is_file() else "roberta"


def is_fairseq(weights: Weights) -> bool:
    """Whether the tensors have fairseq's names."""
    return any("sentence_encoder.embed_tokens." in name for name in weights.held)
