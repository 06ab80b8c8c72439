"""ZeRO stage 3: no rank holds a whole parameter; every one is a flat partition, the optimizer's state with it."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_grad,
    safe_get_local_fp32_param,
    safe_get_local_grad,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from fairscale.nn.model_parallel import initialize as mpu

from xlscale.models.adapters import language_of
from xlscale.parallel.absent_adapters import AbsentAdapters
from xlscale.parallel.offload import swapped_in
from xlscale.parallel.sharded import FP32, ShardedModel
from xlscale.parallel.topology import Topology


@dataclass(frozen=True)
class PartitionedModel(ShardedModel):
    """A model under ZeRO-3."""

    adapter_gradients: list[torch.Tensor] = field(default_factory=list)
    """During an update's step: the engine's pieces of the gradients of the adapters that it trains."""

    @classmethod
    def construction(cls, topology: Topology, engine_config: dict[str, Any]) -> AbstractContextManager[Any]:
        # zero.Init takes no group from the mpu: without data_parallel_group tensor-parallel ranks share slices.
        context: AbstractContextManager[Any] = deepspeed.zero.Init(
            data_parallel_group=topology.dp_group,
            config_dict_or_path=engine_config,
            mpu=mpu,
            remote_device=topology.device.type,
        )
        return context

    def held_shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.ds_shape)

    def partition(self, parameter: Any) -> tuple[int, int]:
        size, numel = parameter.ds_tensor.numel(), torch.Size(self.slices[parameter]).numel()
        start = self.topology.dp_rank * size
        return min(start, numel), min(start + size, numel)

    def local(self, parameter: Any, kind: str) -> torch.Tensor:
        start, stop = self.partition(parameter)
        if kind == FP32:
            local = safe_get_local_fp32_param(parameter)
        elif self.engine.optimizer.optimizer.state:
            local = safe_get_local_optimizer_state(parameter, kind)
        else:
            local = torch.zeros(stop - start)
        return local[: stop - start].detach()

    def read(self, parameter: Any, kind: str) -> torch.Tensor:
        # On a GPU it is a copy there, of what was offloaded for want of room; from a disk, a buffer that is used again.
        return self.local(parameter, kind).to("cpu", copy=self.engine.optimizer.swap_optimizer)

    def write(self, parameter: Any, kind: str, values: torch.Tensor) -> None:
        working: torch.Tensor = parameter.ds_tensor
        padded = torch.zeros(working.numel())
        padded[: values.numel()] = values
        if kind == FP32:
            safe_set_local_fp32_param(parameter, padded)
            working.copy_(padded)  # the engine leaves it as it was
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    def gradient(self, parameter: Any) -> torch.Tensor | None:
        whole: torch.Tensor | None = safe_get_full_grad(parameter)
        return whole

    def counted_gradient(self, parameter: Any) -> torch.Tensor | None:
        if self.engine.optimizer.offload_optimizer:
            return self.offloaded_norm(parameter)
        local = safe_get_local_grad(parameter)
        start, stop = self.partition(parameter)
        return None if local is None else local[: stop - start]  # what is past the end the engine never clears

    def optimized_tensors(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        optimizer = self.engine.optimizer
        groups = optimizer.optimizer.param_groups
        return [
            (groups[optimizer.sub_group_to_group_id[number]], tensor)
            for number, tensor in enumerate(optimizer.fp32_partitioned_groups_flat)
        ]

    def train_adapters(self, languages: Collection[str]) -> None:
        super().train_adapters(languages)
        groups = enumerate(self.optimized_tensors())
        self._absent_adapters.set({number for number, (group, _) in groups if not group["present"]})

    @cached_property
    def _absent_adapters(self) -> AbsentAdapters:
        return AbsentAdapters(self.engine)

    def before_update(self) -> None:
        super().before_update()
        # The engine never clears its buffer of gradients: what an absent adapter has in it is of the last update that
        # it was in. Its pieces can be had before the step only.
        groups = self.engine.optimizer.param_groups
        present = {group.get("language", "") for group in groups if group.get("present")} - {""}
        trained = [parameter for name, parameter in self.named_parameters() if language_of(name) in present]
        self.adapter_gradients[:] = [g for g in map(self.counted_gradient, trained) if g is not None]

    def after_update(self, applied: bool) -> None:
        for gradient in self.adapter_gradients:
            gradient.zero_()
        self.adapter_gradients.clear()

    def members(self) -> list[list[Any]]:
        optimizer = self.engine.optimizer
        found: list[list[Any]] = [[] for _ in optimizer.param_groups]
        for number, parameters in enumerate(optimizer.fp16_groups):  # as many as its buffers need
            found[optimizer.sub_group_to_group_id[number]] += parameters
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Parameters below a threshold stay gathered between steps; what is written to a partition would not show."""
        small = self.engine.optimizer.persistent_parameters
        if small:
            small[0].partition(small)
        yield
        if small:
            small[0].all_gather(small)

    def make_optimizer_state(self, steps: Mapping[str, int]) -> None:
        for number, (group, tensor) in enumerate(self.optimized_tensors()):
            with swapped_in(self.engine.optimizer, number):
                self.make_state_of(tensor, steps.get(group.get("language", ""), 0))
