"""The rules that a configuration obeys, as data and small pure functions; config.py applies them."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xlscale.config_rules_data import DATA_RULES, Rule
from xlscale.config_rules_model import MODEL_RULES
from xlscale.config_values import divisors, multiples, toml_value

# The rules are data: a rule on fields of which one is missing or has a wrong type is passed over, so that all
# other problems still show.
CHOICES: dict[str, tuple[Any, ...]] = {
    "training.precision": ("bf16", "fp32"),
    "parallel.zero_stage": (0, 1, 2, 3),
    "parallel.offload_optimizer": ("none", "cpu", "nvme"),
    "model.model_type": ("xlm-roberta-xl", "xlm-roberta", "roberta", "xmod"),
    "model.hidden_act": ("gelu", "gelu_new", "relu", "silu"),
    "model.position_embedding_type": ("absolute", "relative_key", "relative_key_query"),
    "model.problem_type": ("", "regression", "single_label_classification", "multi_label_classification"),
    # The keys of training.schedule.DECAYS, which this module may not import; a test holds the two equal.
    "data.sampling_over": ("documents", "bytes", "tokens"),
    "data.packing": ("sentences", "documents", "best_fit"),
    "data.tokenize": ("ahead", "on_the_fly"),
    "masking.unit": ("token", "word", "span"),
    "schedule.decay": ("linear", "cosine", "constant"),
    "checkpoint.best_metric": ("loss", "masked_accuracy"),
    "export.dtype": ("fp32", "bf16"),
    "logging.wandb": ("offline", "online", "disabled"),
}
AT_LEAST: dict[str, int] = {
    "training.seed": 0,
    "training.total_steps": 1,
    "training.global_batch_size": 1,
    "training.micro_batch_size": 1,
    "training.max_grad_norm": 0,
    "training.activation_checkpointing": 0,
    "training.threads": 0,
    "training.stop_after": 0,
    "training.grace_seconds": 0,
    "training.hang_seconds": 0,
    "parallel.tensor_parallel": 1,
    "parallel.drift_check_every": 0,
    "model.vocab_size": 8,
    "model.hidden_size": 1,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 1,
    "model.intermediate_size": 1,
    "model.max_position_embeddings": 1,
    "model.type_vocab_size": 1,
    "model.pad_token_id": 0,
    "model.bos_token_id": 0,
    "model.eos_token_id": 0,
    "model.adapter_reduction_factor": 1,
    "model.num_labels": 1,
    "data.sequence_length": 8,
    "data.language_run": 1,
    "data.languages_per_micro_step": 0,
    "data.lanes": 0,
    "data.max_document_characters": 1,
    "data.workers": 0,
    "data.prefetch": 1,
    "masking.span_max": 1,
    "faults.max_bad_documents": 0,
    "faults.max_replaced": 0,
    "optimizer.weight_decay": 0,
    "schedule.warmup_steps": 0,
    "checkpoint.every": 0,
    "checkpoint.keep": 0,
    "checkpoint.keep_every": 0,
    "checkpoint.keep_best": 0,
    "export.every": 0,
    "faults.max_skipped": 1,
    "faults.window": 1,
    "faults.spike_factor": 0,
    "faults.spike_window": 1,
    "faults.keep": 0,
    "logging.every": 1,
}
ABOVE_ZERO = (
    "data.download_gib",
    "export.shard_gb",
    "export.push_hours",
    "model.layer_norm_eps",
    "model.initializer_range",
    "optimizer.learning_rate",
    "optimizer.eps",
)
# name -> (lowest, highest, whether the highest itself is allowed, the usual value)
BETWEEN: dict[str, tuple[float, float, bool, float]] = {
    "model.hidden_dropout_prob": (0.0, 1.0, False, 0.1),
    "model.attention_probs_dropout_prob": (0.0, 1.0, False, 0.1),
    "model.classifier_dropout": (0.0, 1.0, False, 0.1),
    "data.sampling_alpha": (0.0, 1.0, True, 0.3),
    "masking.mask_fraction": (0.0, 1.0, True, 0.8),
    "masking.random_fraction": (0.0, 1.0, True, 0.1),
    "masking.span_p": (0.01, 1.0, True, 0.2),
    "schedule.final_fraction": (0.0, 1.0, True, 0.0),
}
NOT_EMPTY = ("run.name", "run.dir", "data.shards", "data.tokenizer", "logging.wandb_project")


def _value_problem(name: str, value: Any) -> str | None:
    """What is wrong with one well-typed value by itself, if anything."""
    if value is None:  # left out
        return None
    numbers = value if isinstance(value, list) else [value]
    if any(isinstance(n, float) and not math.isfinite(n) for n in numbers):
        return f"{name} = {value} is not finite; set a number"
    if name in CHOICES and value not in CHOICES[name]:
        known = ", ".join(toml_value(choice) for choice in CHOICES[name])
        return f"{name} = {toml_value(value)} must be one of {known}"
    if name in AT_LEAST and value < AT_LEAST[name]:
        return f"{name} = {value} is too small; use {AT_LEAST[name]} or more"
    if name in ABOVE_ZERO and value <= 0:
        return f"{name} = {value} must be above 0; use a positive number"
    if name in BETWEEN:
        low, high, closed, usual = BETWEEN[name]
        if not (low <= value <= high if closed else low <= value < high):
            bound = f"up to {high}" if closed else f"below {high}"
            return f"{name} = {value} must be from {low} {bound}; use {usual}, the usual value"
    if name in NOT_EMPTY and not value.strip():
        return f'{name} = "" must not be empty; set it in [{name.split(".")[0]}]'
    return None


def _run_name(name: str) -> str | None:
    if name != Path(name).name or name == "..":
        return f"run.name = {toml_value(name)} must be one folder's name; put the folders above it in run.dir"
    return None


def _repository(name: str) -> str | None:
    if not name or re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return None
    return f'export.push_to = {toml_value(name)} is no repository; write as "org/name"'


def _batches(whole: int, micro: int) -> str | None:
    if whole % micro == 0:
        return None
    return (
        f"training.global_batch_size = {whole} must be a multiple of micro_batch_size = {micro}; "
        f"the nearest are {multiples(whole, micro)}"
    )


def _warmup(warmup: int, total: int) -> str | None:
    if warmup <= total:
        return None
    return (
        f"schedule.warmup_steps = {warmup} is more than training.total_steps = {total}; "
        f"use at most {total} (6 % of the steps, {max(1, total * 6 // 100)}, is usual)"
    )


def tensor_parallel_problem(tp: int, heads: int, intermediate: int) -> str | None:
    sizes = {"num_attention_heads": heads, "intermediate_size": intermediate}
    wrong = " and ".join(f"{name} = {size}" for name, size in sizes.items() if size % tp)
    if not wrong:
        return None
    return f"parallel.tensor_parallel = {tp} must divide {wrong}; use one of {divisors(*sizes.values())}"


def _tokens_split(sequence_parallel: bool, tp: int, length: int) -> str | None:
    if not sequence_parallel or length % tp == 0:
        return None
    return (
        f"parallel.sequence_parallel = true splits the {length} tokens of data.sequence_length over "
        f"tensor_parallel = {tp} ranks; use a length of {multiples(length, tp)}, or sequence_parallel = false"
    )


def _offload(where: str, folder: str, stage: int) -> str | None:
    if where == "cpu" and stage == 0:
        return 'parallel.offload_optimizer = "cpu" needs zero_stage = 1, 2 or 3; set one, or "none"'
    if where == "nvme" and (stage != 3 or not folder):
        return 'parallel.offload_optimizer = "nvme" needs zero_stage = 3 and an offload_folder; set both'
    if where != "nvme" and folder:
        return f'parallel.offload_folder = {toml_value(folder)} is for offload_optimizer = "nvme"; leave it out'
    return None


def _keep_every(keep_every: int, every: int) -> str | None:
    if not keep_every or not every or keep_every % every == 0:
        return None
    near = multiples(keep_every, every)
    return f"checkpoint.keep_every = {keep_every} must be a multiple of every = {every}; the nearest are {near}"


def _spike(factor: float) -> str | None:
    if factor == 0 or factor > 1:
        return None
    return f"faults.spike_factor = {factor} would skip ordinary updates; use 2.0 or more, or 0 for no such rule"


def _betas(betas: list[float]) -> str | None:
    if len(betas) == 2 and all(0.0 <= b < 1.0 for b in betas):
        return None
    return f"optimizer.betas = {betas} must be two numbers from 0.0 below 1.0; use [0.9, 0.98] as RoBERTa"


CROSS_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("run.name",), _run_name),
    (("export.push_to",), _repository),
    (("training.global_batch_size", "training.micro_batch_size"), _batches),
    (("schedule.warmup_steps", "training.total_steps"), _warmup),
    (
        (
            "parallel.tensor_parallel",
            "model.num_attention_heads",
            "model.intermediate_size",
        ),
        tensor_parallel_problem,
    ),
    (("parallel.sequence_parallel", "parallel.tensor_parallel", "data.sequence_length"), _tokens_split),
    (("parallel.offload_optimizer", "parallel.offload_folder", "parallel.zero_stage"), _offload),
    (("checkpoint.keep_every", "checkpoint.every"), _keep_every),
    (("faults.spike_factor",), _spike),
    (("optimizer.betas",), _betas),
    *MODEL_RULES,
    *DATA_RULES,
)


def broken_rules(values: Mapping[str, Any]) -> list[tuple[tuple[str, ...], str]]:
    """The fields and the line of every broken rule; `values` is section.key -> well-typed value."""
    found = {name: _value_problem(name, value) for name, value in values.items()}
    problems: list[tuple[tuple[str, ...], str]] = [((name,), problem) for name, problem in found.items() if problem]
    sound = {name for name, problem in found.items() if not problem}
    for names, rule in CROSS_RULES:
        if sound.issuperset(names) and (problem := rule(*(values[name] for name in names))):
            problems.append((names, problem))
    return problems
