"""The learning rate as a pure function of the step; no state, so resuming and planning need none."""

import math
from collections.abc import Callable

from xlscale.config_sections import ScheduleConfig

DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: 0.5 * (1.0 + math.cos(math.pi * p)),
    "constant": lambda p: 1.0,
}
"""Fraction of the peak at progress p, 0 at the end of the warm-up and 1 at the end of the run."""


def lr_at(step: int, optimizer_lr: float, cfg: ScheduleConfig, total_steps: int) -> float:
    """Learning rate of update `step` (0-based): linear warm-up to `optimizer_lr`, then DECAYS[cfg.decay].

    The first update already moves (1/warmup_steps of the peak), the update after the warm-up has the peak,
    and the decay would reach cfg.final_fraction of it at total_steps; past the end that value stays.
    RoBERTa's schedule (Liu et al. 2019, section 3.1) is "linear" with final_fraction 0.
    """
    assert step >= 0, step
    if step < cfg.warmup_steps:
        return optimizer_lr * (step + 1) / cfg.warmup_steps
    progress = min(1.0, (step - cfg.warmup_steps) / max(1, total_steps - cfg.warmup_steps))
    shape = DECAYS[cfg.decay](progress)
    return optimizer_lr * (cfg.final_fraction + (1.0 - cfg.final_fraction) * shape)
