"""AdamW's parameter groups: matrices decay, biases and norms do not; every language's adapters are groups of their own.

What an update does not train stays as it is: no decay, no momentum, and a count of updates of its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xlscale.config_sections import OptimizerConfig
from xlscale.models.adapters import language_of

DECAY, NO_DECAY = "decay", "no_decay"


def group_of(name: str) -> str:
    """Name of the group of a parameter: biases and LayerNorms are not decayed."""
    return NO_DECAY if name.endswith(".bias") or name.rsplit(".", 2)[-2].endswith("norm") else DECAY


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig
) -> list[dict[str, Any]]:
    """One group per kind and language, each with its own weight decay; frozen parameters are in none.

    `language`: "" for all that is no adapter. `present`: whether the next update trains it.
    """
    members: dict[tuple[str, str], list[nn.Parameter]] = {(DECAY, ""): [], (NO_DECAY, ""): []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members.setdefault((group_of(name), language_of(name)), []).append(parameter)
    decays = {DECAY: cfg.weight_decay, NO_DECAY: 0.0}
    return [
        {
            "name": f"{group}:{language}" if language else group,
            "language": language,
            "present": True,
            "params": params,
            "weight_decay": decays[group],
        }
        for (group, language), params in members.items()
        if params
    ]


def adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay, arXiv:1711.05101) over parameter_groups; the loop sets the rate of each step."""
    made = torch.optim.AdamW(
        parameter_groups(named_parameters, cfg),
        lr=cfg.learning_rate,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        fused=True,
    )
    made.register_step_pre_hook(_put_aside)
    made.register_step_post_hook(_put_back)
    return made


def _put_aside(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if not group["present"]:
            group["aside"], group["params"] = group["params"], []


def _put_back(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if "aside" in group:
            group["params"] = group.pop("aside")
