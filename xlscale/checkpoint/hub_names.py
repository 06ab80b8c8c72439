"""Our names of the parameters and those on the Hub: one table, whose readers are import and export."""

import re

from xlscale.checkpoint.head_names import PREFIX, as_written, head_hf_name
from xlscale.config_sections import ModelConfig
from xlscale.models.families import encoder_shapes
from xlscale.models.heads import head_shapes

Shapes = dict[str, tuple[int, ...]]

# Our module -> theirs, with N for a layer and L for a language; (elsewhere, in XL and XXL) where they differ.
HF_NAMES: dict[str, str | tuple[str, str]] = {
    "encoder.embeddings.word": "roberta.embeddings.word_embeddings",
    "encoder.embeddings.position": "roberta.embeddings.position_embeddings",
    "encoder.embeddings.token_type": "roberta.embeddings.token_type_embeddings",
    "encoder.embeddings.norm": "roberta.embeddings.LayerNorm",
    "encoder.layers.N.attention.query": "roberta.encoder.layer.N.attention.self.query",
    "encoder.layers.N.attention.key": "roberta.encoder.layer.N.attention.self.key",
    "encoder.layers.N.attention.value": "roberta.encoder.layer.N.attention.self.value",
    "encoder.layers.N.attention.distance": "roberta.encoder.layer.N.attention.self.distance_embedding",
    "encoder.layers.N.attention.output": "roberta.encoder.layer.N.attention.output.dense",
    "encoder.layers.N.attention_norm": (
        "roberta.encoder.layer.N.attention.output.LayerNorm",
        "roberta.encoder.layer.N.attention.self_attn_layer_norm",
    ),
    "encoder.layers.N.cross_attention.query": "roberta.encoder.layer.N.crossattention.self.query",
    "encoder.layers.N.cross_attention.key": "roberta.encoder.layer.N.crossattention.self.key",
    "encoder.layers.N.cross_attention.value": "roberta.encoder.layer.N.crossattention.self.value",
    "encoder.layers.N.cross_attention.output": "roberta.encoder.layer.N.crossattention.output.dense",
    "encoder.layers.N.cross_attention_norm": (
        "roberta.encoder.layer.N.crossattention.output.LayerNorm",
        "roberta.encoder.layer.N.crossattention.self_attn_layer_norm",
    ),
    "encoder.layers.N.mlp.up": "roberta.encoder.layer.N.intermediate.dense",
    "encoder.layers.N.mlp.down": "roberta.encoder.layer.N.output.dense",
    "encoder.layers.N.mlp_norm": (
        "roberta.encoder.layer.N.output.LayerNorm",
        "roberta.encoder.layer.N.LayerNorm",
    ),
    "encoder.layers.N.adapters.L.down": "roberta.encoder.layer.N.output.adapter_modules.L.dense1",
    "encoder.layers.N.adapters.L.up": "roberta.encoder.layer.N.output.adapter_modules.L.dense2",
    "encoder.layers.N.adapter_norm": "roberta.encoder.layer.N.output.adapter_layer_norm",
    "encoder.final_norm": "roberta.encoder.LayerNorm",
}

# What older folders hold besides: one of ours by a second name (must be equal), or no part of the model.
SECOND_NAMES = {
    "roberta.embeddings.word_embeddings.weight": "lm_head.decoder.weight",
    "lm_head.bias": "lm_head.decoder.bias",
}
VOCABULARY = ("encoder.embeddings.word.weight", "head.decoder.bias")
"""Our parameters with a row for each id; the second one is a language model's."""
BUFFERS = {"roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids"}


def shapes_of(model: ModelConfig, head: str = "ForMaskedLM", pooler: bool = True) -> Shapes:
    """Our name and shape of every parameter of a model with a head (a key of HEADS), the tied weight once.

    pooler: whether the bare model has one.
    """
    return encoder_shapes(model) | head_shapes(model, head, pooler)


def wildcards(module: str) -> tuple[str, dict[str, str]]:
    """The row of HF_NAMES that a module of the encoder has, and what N and L stand for in it."""
    layer = re.search(r"\.layers\.(\d+)(?=\.)", module)
    language = re.search(r"\.adapters\.(\w+)(?=\.)", module)
    for found, wild in ((language, ".adapters.L"), (layer, ".layers.N")):
        if found:
            module = module.replace(found[0], wild)
    return module, {wild: found[1] for wild, found in (("N", layer), ("L", language)) if found}


def filled(pattern: str, values: dict[str, str]) -> str:
    """A name with a layer's number for N and a language for L."""
    return ".".join(values.get(part, part) for part in pattern.split("."))


def hf_names(model: ModelConfig, head: str = "ForMaskedLM", pooler: bool = True) -> dict[str, str]:
    """Our name of every parameter -> its name in the files of transformers' class for `head`."""
    xl = model.model_type == "xlm-roberta-xl"
    names = {}
    for ours in shapes_of(model, head, pooler):
        if ours.startswith("encoder."):
            module, leaf = ours.rsplit(".", 1)
            row, values = wildcards(module)
            theirs = HF_NAMES[row]
            name = f"{filled(theirs[xl] if isinstance(theirs, tuple) else theirs, values)}.{leaf}"
        else:
            name = head_hf_name(ours)
        names[ours] = as_written(name, head)
    return names


def with_prefix(name: str) -> str:
    """A bare model's name as all other classes have it."""
    bare = ("embeddings.", "encoder.", "pooler.")
    return PREFIX + name if name.startswith(bare) else name


def compare_shapes(found: Shapes, wanted: Shapes, where: str) -> None:
    """ValueError with the first few tensors of each kind unless names and shapes are equal on both sides."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    wrong = [f"{name} {tuple(found[name])} for {wanted[name]}" for name in both if tuple(found[name]) != wanted[name]]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, names in (("missing", missing), ("unexpected", extra), ("of another shape", wrong))
        if names
    ]
    if problems:
        raise ValueError(
            f"tensors {where} do not fit the config: {'; '.join(problems)}; "
            "use weights and the config that they were trained with"
        )
