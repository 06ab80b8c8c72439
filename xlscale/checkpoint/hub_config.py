"""config.json of a Hub folder, both directions: every field is written, and none that is read is ignored."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, get_type_hints

from xlscale.config_rules import broken_rules
from xlscale.config_rules_model import XMOD_ONLY
from xlscale.config_sections import ModelConfig
from xlscale.config_values import TYPE_NAMES, exact, fits

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "xlm-roberta-xl": "XLMRobertaXL", "xmod": "Xmod"}
TOKENIZERS = {
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "xlm-roberta-xl": "XLMRobertaTokenizer",
    "xmod": "XLMRobertaTokenizer",
}
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMMON_FILES = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json")
TOKENIZER_FILES = {
    "RobertaTokenizer": ("vocab.json", "merges.txt", *_COMMON_FILES),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", *_COMMON_FILES),
}

# Fields that we have one value for: refused when they are read otherwise.
ONLY: dict[str, Any] = {
    "tie_word_embeddings": True,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "cross_attention_hidden_size": None,
    "pruned_heads": {},
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
# Fields without a bearing on weights or outputs.
WITHOUT_EFFECT = {
    "architectures", "dtype", "torch_dtype", "tokenizer_class", "transformers_version", "_name_or_path",
    "output_past", "gradient_checkpointing", "language", "sep_token_id", "cls_token_id", "mask_token_id",
    "unk_token_id", "finetuning_task", "chunk_size_feed_forward",
}  # fmt: skip
# The same in all classes of transformers; other defaults differ, so those fields must be in the file.
CLASS_DEFAULTS: dict[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "classifier_dropout": None,
    "initializer_range": 0.02,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "use_cache": True,
    "problem_type": None,
}
XMOD_DEFAULTS: dict[str, Any] = XMOD_ONLY | {"languages": ["en_XX"], "default_language": None}
# Ours is "" where theirs is null.
NULLABLE = ("problem_type", "default_language")
# Our fields that are written in another form, as id2label and label2id.
LABELS = ("num_labels", "id2label")
MOST_LABELS = 1 << 20
"""Of a config.json, so that a wrong number does not make as many names."""
OURS = {field.name for field in fields(ModelConfig)}


def hub_config(model: ModelConfig, dtype: str, head: str = "ForMaskedLM") -> dict[str, Any]:
    """The content of config.json: every field, because the class defaults of transformers are other values.

    dtype: torch's name of the weights' number format, "float32" or "bfloat16". head: how the architecture's name ends.
    """
    foreign = () if model.model_type == "xmod" else XMOD_ONLY
    ours = {name: value for name, value in asdict(model).items() if name not in (*foreign, *LABELS)}
    nulls = {name: None for name in NULLABLE if name in ours and not ours[name]}
    names = [model.id2label.get(str(i), f"LABEL_{i}") for i in range(model.num_labels)]
    return {
        "architectures": [CLASSES[model.model_type] + head],
        **ours,
        **nulls,
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "tie_word_embeddings": True,
        "dtype": dtype,
        "tokenizer_class": TOKENIZERS[model.model_type],
    }


def _content(path: Path) -> dict[str, Any]:
    """A config.json of one of the families; ValueError for anything else."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hub folder needs it beside the weights")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew") from None
    family = content.get("model_type") if isinstance(content, dict) else None
    if family not in list(CLASSES):  # a list or a table cannot be looked up
        raise ValueError(f"{path}: model_type={family!r} is not a family; use one of {sorted(CLASSES)}")
    return content


def read_head(path: Path) -> str | None:
    """How the name of the architecture in a config.json ends, "ForMaskedLM" for instance; None where it has none.

    ValueError for an architecture of another family, and for several.
    """
    content = _content(path)
    named = content.get("architectures") or []
    prefix = CLASSES[content["model_type"]]
    if named and (not isinstance(named, list) or len(named) > 1 or not str(named[0]).startswith(prefix)):
        raise ValueError(
            f"{path}: architectures={named!r} is not a class of {content['model_type']}; name one {prefix}..."
        )
    return named[0].removeprefix(prefix) if named else None


def read_hub_config(path: Path) -> ModelConfig:
    """The model section that a config.json describes; ValueError for a field unknown or not honoured."""
    content = _content(path)
    xmod = content["model_type"] == "xmod"
    values = CLASS_DEFAULTS | (XMOD_DEFAULTS if xmod else XMOD_ONLY) | content
    values |= {"num_labels": 2, "id2label": {}}
    problems = _read_labels(content, values)
    for name in NULLABLE:
        values[name] = "" if values[name] is None else values[name]
    factor = values["adapter_reduction_factor"]
    if isinstance(factor, float) and factor.is_integer():  # Facebook's own folders have 2.0
        values["adapter_reduction_factor"] = int(factor)

    typed: dict[str, Any] = {}
    for name, kind in get_type_hints(ModelConfig).items():
        if name not in values:
            problems.append(f"{name} is missing")
        elif not fits(values[name], kind):
            problems.append(f"{name}={values[name]!r} must be {TYPE_NAMES[kind]}")
        else:
            typed[name] = exact(values[name], kind)
    known = (OURS if xmod else OURS - XMOD_ONLY.keys()) | ONLY.keys() | WITHOUT_EFFECT | {"label2id", "_num_labels"}
    for name, value in content.items():
        if name in ONLY and value != ONLY[name]:
            problems.append(f"{name}={value!r} must be {ONLY[name]!r}")
        elif name not in known:
            problems.append(f"{name}={value!r} is unknown")
    problems += [line for _, line in broken_rules({f"model.{name}": value for name, value in typed.items()})]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}; correct it, or remove a field that changes nothing")
    return ModelConfig(**typed)


def _read_labels(content: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Set num_labels and id2label in `values` from all the fields that speak of labels; what is wrong with them."""
    counts = [content[name] for name in ("num_labels", "_num_labels") if content.get(name) is not None]
    if not all(type(count) is int and 0 < count <= MOST_LABELS for count in counts):
        return [f"num_labels={counts[0]!r} must be an integer from 1 to {MOST_LABELS}"]
    names = content.get("id2label")
    if names is None:
        names = {str(i): f"LABEL_{i}" for i in range(counts[0] if counts else 2)}
    if not fits(names, dict[str, str]):
        return [f"id2label={names!r} must be {TYPE_NAMES[dict[str, str]]}"]
    values["num_labels"], values["id2label"] = len(names), names
    problems = [f"num_labels={n} is not that of id2label, {len(names)}" for n in counts if n != len(names)]
    numbers = content.get("label2id")
    if numbers is not None and numbers != {name: int(i) for i, name in names.items() if i.isdecimal()}:
        problems.append(f"label2id={numbers!r} is not id2label turned round")
    if all(name == f"LABEL_{i}" for i, name in names.items()):
        values["id2label"] = {}
    return problems
