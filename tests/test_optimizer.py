"""Parameter groups and the update rule: matrices decay, biases and norms do not."""

import pytest
import torch

from xlscale.config_sections import OptimizerConfig
from xlscale.models.families import preset
from xlscale.models.heads import MaskedLM
from xlscale.training.optimizer import DECAY, NO_DECAY, adamw, parameter_groups

CFG = OptimizerConfig(learning_rate=0.1, weight_decay=0.5)


@pytest.mark.parametrize("family", ["xlm-roberta-base", "xlm-roberta-xl"])
def test_biases_and_norms_do_not_decay_and_all_else_does(family: str) -> None:
    with torch.device("meta"):
        model = MaskedLM(preset(family, num_hidden_layers=2))
    groups = {group["name"]: group for group in parameter_groups(model.named_parameters(), CFG)}
    assert groups[DECAY]["weight_decay"] == 0.5 and groups[NO_DECAY]["weight_decay"] == 0.0
    assert all(parameter.dim() == 2 for parameter in groups[DECAY]["params"])
    assert all(parameter.dim() == 1 for parameter in groups[NO_DECAY]["params"])
    everything = [id(parameter) for group in groups.values() for parameter in group["params"]]
    assert sorted(everything) == sorted(id(parameter) for parameter in model.parameters())


def test_frozen_parameters_are_in_no_group() -> None:
    frozen, free = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False), torch.nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups([("mlp.up.weight", frozen), ("mlp.down.weight", free)], CFG)
    assert [group["params"] for group in groups] == [[free]]


def test_first_update_is_adamws() -> None:
    """After one step the moments' bias corrections cancel: w - lr * wd * w - lr * g / (|g| + eps)."""
    weight = torch.nn.Parameter(torch.tensor([[2.0]]))
    optimizer = adamw([("mlp.up.weight", weight)], CFG)
    weight.grad = torch.tensor([[3.0]])
    optimizer.step()
    assert weight.item() == pytest.approx(2.0 - 0.1 * 0.5 * 2.0 - 0.1)
