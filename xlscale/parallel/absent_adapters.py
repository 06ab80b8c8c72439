"""What the adapters of absent languages cost under ZeRO-3: next to nothing, however many are registered.

The engine's step copies, clips, updates and copies back every group of parameters, adds up the norm of each over all
ranks, and gathers again all small parameters, biases of all adapters among them. Of a group that the update does not
train, all of that is left out here; its gradient is zero and its weights stay.
"""

from collections.abc import Callable
from typing import Any

import torch

from xlscale.models.adapters import language_of

OF_A_GROUP = (
    "_prepare_sub_group",
    "unscale_and_clip_grads",
    "_optimizer_step",
    "_reassign_or_swap_out_partitioned_parameters",
    "_release_sub_group",
)
"""Methods that the engine's step calls with the number of each group of parameters, one after the other."""


class AbsentAdapters:
    """Numbers of the groups that the next update does not train, left out of the engine's step."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self._groups = optimizer.fp16_groups
        self._numbers: set[int] = set()
        self._parameters: set[int] = set()
        for method in OF_A_GROUP:
            setattr(optimizer, method, self._unless_absent(getattr(optimizer, method)))
        optimizer.get_grad_norm_direct = self._norm(optimizer.get_grad_norm_direct)
        _gather_no_bias(engine)

    def set(self, numbers: set[int]) -> None:
        """The groups' numbers of the next update."""
        self._numbers = numbers
        self._parameters = {id(self._groups[number]) for number in numbers}

    def _unless_absent(self, method: Callable[..., None]) -> Callable[..., None]:
        def only_present(number: int, *arguments: Any) -> None:
            if number not in self._numbers:
                method(number, *arguments)

        return only_present

    def _norm(self, norm_of: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def norm(gradients: Any, parameters: Any, *arguments: Any) -> torch.Tensor:
            if id(parameters) in self._parameters:
                return torch.zeros(())
            return norm_of(gradients, parameters, *arguments)

        return norm


def _gather_no_bias(engine: Any) -> None:
    """Let the engine partition adapters' biases too, which it would hold gathered on every rank for their smallness."""
    small: list[Any] = engine.optimizer.persistent_parameters
    adapters = {id(p) for name, p in engine.module.named_parameters() if language_of(name)}
    partitioned = [parameter for parameter in small if id(parameter) in adapters]
    for parameter in partitioned:
        parameter.ds_persist = False
    if partitioned:
        partitioned[0].partition(partitioned)
    small[:] = [parameter for parameter in small if id(parameter) not in adapters]
