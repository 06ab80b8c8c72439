"""The rules of [data] and [masking], as those of config_rules.py."""

import re
from collections.abc import Callable
from typing import Any

from xlscale.config_values import fits, nearest, toml_value

CHANGES = (
    "order_version",
    "corpus",
    "tokenizer",
    "sequence_length",
    "packing",
    "languages",
    "sampling",
    "language_run",
    "lanes",
    "global_batch_size",
    "seed",
)
"""What a stream's state says besides its position (xlscale.data.stream); data.allow_changes names some of it."""
NEVER_CHANGES = ("global_batch_size",)
"""The update that a run stands at would be at another slot: samples would be lost, or come twice."""

_PHASE: dict[str, Any] = {"step": int, "alpha": float, "languages": list[str], "weights": dict[str, float]}


def _corruption(mask: float, random: float) -> str | None:
    if mask + random <= 1.0 + 1e-9:
        return None
    return (
        f"masking.mask_fraction = {mask} and random_fraction = {random} must not add up to more than 1; "
        "use 0.8 and 0.1, as all published models"
    )


def _probability(p: float) -> str | None:
    if 0.0 < p < 1.0:
        return None
    return f"masking.mlm_probability = {p} must be above 0.0 and below 1.0; use 0.15, the usual value"


def _languages(codes: list[str], name: str = "data.languages") -> str | None:
    twice = sorted({code for code in codes if codes.count(code) > 1})
    if not twice:
        return None
    return f"{name} names {', '.join(twice)} more than once; name each language once"


def _weights(weights: dict[str, float]) -> str | None:
    return _weights_problem("data.language_weights", weights)


def _weights_problem(name: str, weights: dict[str, float]) -> str | None:
    wrong = [code for code, weight in weights.items() if not 0.0 < weight < 1e12]
    if not wrong:
        return None
    return (
        f"{name}: {wrong[0]} = {weights[wrong[0]]} must be above 0 and finite; a language that is not to be drawn "
        "stands in no phase's languages, or not in data.languages"
    )


def _phases(phases: list[dict[str, Any]]) -> str | None:
    last = -1
    for number, phase in enumerate(phases, start=1):
        name = f"data.phases, number {number}"
        for key, value in phase.items():
            if key not in _PHASE:
                return f"{name}: unknown key {key}{nearest(key, list(_PHASE))}"
            if not fits(value, _PHASE[key]):
                return f"{name}: {key} = {value!r} has the wrong type; write as {{ step = 9000, alpha = 0.5 }}"
        if "step" not in phase or phase["step"] <= last:
            return f"{name}: step = {phase.get('step')} must be above {last}, the step before it; order them by step"
        last = phase["step"]
        if not 0.0 <= phase.get("alpha", 0.3) <= 1.0:
            return f"{name}: alpha = {phase['alpha']} must be from 0.0 up to 1.0; use 0.3, the usual value"
        if problem := _languages(phase.get("languages", []), f"{name}: languages"):
            return problem
        if problem := _weights_problem(f"{name}: weights", phase.get("weights", {})):
            return problem
    return None


def _lanes(lanes: int, run: int, batch: int) -> str | None:
    if batch % run:
        good = [d for d in range(1, batch + 1) if batch % d == 0]
        near = min(good, key=lambda d: (abs(d - run), d))
        return f"data.language_run = {run} must divide training.global_batch_size = {batch}; the nearest is {near}"
    if lanes and batch // run % lanes:
        good = [d for d in range(1, batch // run + 1) if batch // run % d == 0]
        near = min(good, key=lambda d: (abs(d - lanes), d))
        return (
            f"data.lanes = {lanes} must divide the {batch // run} runs of training.global_batch_size = {batch} "
            f"(data.language_run = {run}); the nearest is {near}, 0 chooses one"
        )
    return None


def adapter_problems(languages_per_micro_step: int, offload: str) -> list[str]:
    """What forbids to train a model with adapters."""
    problems = []
    if not languages_per_micro_step:
        problems.append(
            'data.languages_per_micro_step = 0 is not for training model_type = "xmod": all ranks must run the same '
            "adapters; set it to 1 or more, and data.language_run to the samples of a micro-step of all ranks divided "
            "by it"
        )
    if offload != "none":
        problems.append(
            f'parallel.offload_optimizer = "{offload}" is not for model_type = "xmod": the engine keeps gradients of '
            "adapters that an update does not train where they cannot be cleared; use none"
        )
    return problems


def routing_problem(dp: int, micro: int, batch: int, run: int, languages: int) -> str | None:
    """What forbids that each of `dp` ranks has, in every micro-step, an equal part of the same runs of one language.

    micro: samples of a rank's micro-batch. languages: data.languages_per_micro_step.
    """

    def allowed(ranks: int, rows: int) -> bool:
        whole = ranks * rows
        if batch % whole:
            return False
        return run % whole == 0 or (whole % run == 0 and run % ranks == 0 and whole // run <= languages)

    if not languages or allowed(dp, micro):
        return None
    shown = (
        f"data.language_run = {run} with data.languages_per_micro_step = {languages} does not allow {dp} data-parallel "
        f"ranks x training.micro_batch_size = {micro}: every rank needs an equal part of {languages} runs at most"
    )
    sizes = sorted((rows for rows in range(1, batch // dp + 1) if allowed(dp, rows)), key=lambda n: (abs(n - micro), n))
    if sizes:
        return f"{shown}; the nearest micro_batch_size is {sizes[0]}"
    ranks = sorted((n for n in range(1, batch + 1) if allowed(n, micro)), key=lambda n: (abs(n - dp), n))
    if ranks:
        return f"{shown}; the nearest number of data-parallel ranks is {ranks[0]}"
    return f"{shown}; use data.language_run = {dp * micro}, one run for each micro-step (a new run: it is frozen)"


def _allowed(names: list[str]) -> str | None:
    known = [name for name in CHANGES if name not in NEVER_CHANGES]
    wrong = [name for name in names if name not in known]
    return f"data.allow_changes names {toml_value(wrong[0])}{nearest(wrong[0], known)}" if wrong else None


def _apart(attention: bool, decoder: bool) -> str | None:
    if attention or not decoder:
        return None
    return "data.document_attention = false is not for decoders (model.is_decoder = true); set it to true"


def _probabilities(points: list[list[float]]) -> str | None:
    last = -1.0
    for point in points:
        shown = f"masking.mlm_probability_schedule holds {point}"
        if len(point) != 2 or point[0] != int(point[0]):
            return f"{shown}, which is no pair of a step and a probability; write as [[0, 0.3], [10000, 0.15]]"
        if point[0] <= last:
            return f"{shown}, whose step must be above {last:.0f}, the one before; order the points by step"
        if not 0.0 < point[1] < 1.0:
            return f"{shown}, whose probability must be above 0.0 and below 1.0; use 0.15, the usual value"
        last = point[0]
    return None


def _url(shards: str, cache: str) -> str | None:
    if cache or not re.match(r"[a-z0-9+]+://", shards):
        return None
    return (
        f"data.cache is empty, and data.shards = {toml_value(shards)} is remote; name a local folder for token shards"
    )


Rule = Callable[..., str | None]
DATA_RULES: tuple[tuple[tuple[str, ...], Rule], ...] = (
    (("masking.mlm_probability",), _probability),
    (("masking.mlm_probability_schedule",), _probabilities),
    (("masking.mask_fraction", "masking.random_fraction"), _corruption),
    (("data.languages",), _languages),
    (("data.language_weights",), _weights),
    (("data.phases",), _phases),
    (("data.lanes", "data.language_run", "training.global_batch_size"), _lanes),
    (("data.allow_changes",), _allowed),
    (("data.document_attention", "model.is_decoder"), _apart),
    (("data.shards", "data.cache"), _url),
)
