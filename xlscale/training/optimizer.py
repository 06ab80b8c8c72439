"""AdamW's parameter groups: matrices decay, biases and norms do not."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from xlscale.config_sections import OptimizerConfig

DECAY, NO_DECAY = "decay", "no_decay"


def group_of(name: str) -> str:
    """Name of the group of a parameter: biases and LayerNorms are not decayed."""
    return NO_DECAY if name.endswith(".bias") or name.rsplit(".", 2)[-2].endswith("norm") else DECAY


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig
) -> list[dict[str, Any]]:
    """One group per kind, each with its own weight decay; frozen parameters are in none."""
    members: dict[str, list[nn.Parameter]] = {DECAY: [], NO_DECAY: []}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            members[group_of(name)].append(parameter)
    decays = {DECAY: cfg.weight_decay, NO_DECAY: 0.0}
    return [
        {"name": group, "params": params, "weight_decay": decays[group]} for group, params in members.items() if params
    ]


def adamw(named_parameters: Iterable[tuple[str, nn.Parameter]], cfg: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (decoupled weight decay, arXiv:1711.05101) over parameter_groups; the loop sets the rate of each step."""
    return torch.optim.AdamW(
        parameter_groups(named_parameters, cfg),
        lr=cfg.learning_rate,
        betas=(cfg.betas[0], cfg.betas[1]),
        eps=cfg.eps,
        fused=True,
    )
