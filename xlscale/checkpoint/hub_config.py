"""config.json of a Hub folder, both directions: every field is written, and none that is read is ignored."""

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from xlscale.config import ModelConfig
from xlscale.config_rules import broken_rules

CLASSES = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "xlm-roberta-xl": "XLMRobertaXL"}
TOKENIZERS = {
    "roberta": "RobertaTokenizer",
    "xlm-roberta": "XLMRobertaTokenizer",
    "xlm-roberta-xl": "XLMRobertaTokenizer",
}
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMMON_FILES = ("tokenizer.json", TOKENIZER_CONFIG, "special_tokens_map.json")
TOKENIZER_FILES = {
    "RobertaTokenizer": ("vocab.json", "merges.txt", *_COMMON_FILES),
    "XLMRobertaTokenizer": ("sentencepiece.bpe.model", *_COMMON_FILES),
}

# Fields that a masked LM of ours has one value for: written so, and refused when they are read otherwise.
ONLY = {
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# Fields without a bearing on a masked LM's weights or logits.
WITHOUT_EFFECT = {
    "architectures", "dtype", "torch_dtype", "tokenizer_class", "transformers_version", "_name_or_path",
    "use_cache", "output_past", "classifier_dropout", "gradient_checkpointing", "id2label", "label2id",
    "num_labels", "_num_labels", "problem_type", "language", "sep_token_id", "cls_token_id", "mask_token_id",
    "unk_token_id", "return_dict", "output_attentions", "output_hidden_states", "finetuning_task",
    "chunk_size_feed_forward",
}  # fmt: skip
# The same in all three classes of transformers; other defaults differ, so those fields must be in the file.
CLASS_DEFAULTS = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
OURS = {field.name for field in fields(ModelConfig)}


def hub_config(model: ModelConfig, dtype: str) -> dict[str, Any]:
    """The content of config.json: every field, because the class defaults of transformers are other values.

    dtype: torch's name of the weights' number format, "float32" or "bfloat16".
    """
    return {
        "architectures": [f"{CLASSES[model.model_type]}ForMaskedLM"],
        **asdict(model),
        **ONLY,
        "classifier_dropout": None,
        "dtype": dtype,
        "tokenizer_class": TOKENIZERS[model.model_type],
        "use_cache": True,
    }


def read_hub_config(path: Path) -> ModelConfig:
    """The model section that a config.json describes; ValueError for a field unknown or not honoured."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; a Hub folder needs it beside the weights")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); write it anew") from None
    family = content.get("model_type") if isinstance(content, dict) else None
    if family not in CLASSES:
        raise ValueError(f"{path}: model_type={family!r} is not a family; use one of {sorted(CLASSES)}")

    values = CLASS_DEFAULTS | content
    problems: list[str] = []
    typed: dict[str, Any] = {}
    for field in fields(ModelConfig):
        value = values.get(field.name)
        if field.type is float and type(value) is int:
            value = float(value)
        if field.name not in values:
            problems.append(f"{field.name} is missing")
        elif type(value) is not field.type:
            problems.append(f"{field.name}={value!r} must be {getattr(field.type, '__name__', field.type)}")
        else:
            typed[field.name] = value
    for name, value in content.items():
        if name in ONLY and value != ONLY[name]:
            problems.append(f"{name}={value!r} must be {ONLY[name]!r}")
        elif name not in OURS and name not in ONLY and name not in WITHOUT_EFFECT:
            problems.append(f"{name}={value!r} is unknown")
    problems += [line for _, line in broken_rules({f"model.{name}": value for name, value in typed.items()})]
    if problems:
        raise ValueError(f"{path}: {'; '.join(problems)}; correct it, or remove a field that changes nothing")
    return ModelConfig(**typed)
