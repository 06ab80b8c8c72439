"""ZeRO stages 0 to 2: every data-parallel rank holds the working copy of its whole slice.

The optimizer's state, with the fp32 weights, is spread over the data-parallel ranks at stages 1 and 2 and whole on all
at stage 0. A partition is here only what a rank writes to a checkpoint: an equal share of each slice.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import nn

from xlscale.config_sections import Config
from xlscale.parallel.replicated_optimizer import ReplicatedOptimizer
from xlscale.parallel.sharded import FP32, MakeOptimizer, ShardedModel, share
from xlscale.parallel.topology import Topology


class ReplicatedModel(ShardedModel):
    """A model whose weights are whole on every data-parallel rank."""

    @classmethod
    def construction(cls, topology: Topology, engine_config: dict[str, Any]) -> AbstractContextManager[Any]:
        return torch.device(topology.device)

    @abstractmethod
    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        """The slice as it is in memory, fp32. Collective."""

    @abstractmethod
    def set_whole(self, parameter: Any, kind: str, whole: torch.Tensor) -> None:
        """Set what this rank's optimizer has of the slice."""

    def held_shape(self, parameter: Any) -> tuple[int, ...]:
        return tuple(parameter.shape)

    def partition(self, parameter: Any) -> tuple[int, int]:
        return share(torch.Size(self.slices[parameter]).numel(), self.topology.dp_rank, self.topology.dp)

    def local(self, parameter: Any, kind: str) -> torch.Tensor:
        start, stop = self.partition(parameter)
        if kind != FP32 and not self.engine.optimizer.optimizer.state:
            return torch.zeros(stop - start)
        return self.whole(parameter, kind).reshape(-1)[start:stop]

    def read(self, parameter: Any, kind: str) -> torch.Tensor:
        # A view would keep the whole slice in memory, and a GPU has no room for a copy of the optimizer's state.
        return self.local(parameter, kind).to("cpu", copy=True)

    def write(self, parameter: Any, kind: str, values: torch.Tensor) -> None:
        whole = self._gathered(parameter, values)
        self.set_whole(parameter, kind, whole)
        if kind == FP32:
            parameter.data.copy_(whole)

    def _gathered(self, parameter: Any, values: torch.Tensor) -> torch.Tensor:
        """The slice as it is in memory, from the partitions of all data-parallel ranks."""
        numel = torch.Size(self.slices[parameter]).numel()
        mine = torch.zeros(-(-numel // self.topology.dp), device=parameter.device)
        mine[: values.numel()] = values
        everyone = mine.new_empty(mine.numel() * self.topology.dp)
        dist.all_gather_into_tensor(everyone, mine, group=self.topology.dp_group)
        whole = mine.new_zeros(parameter.numel())
        whole[:numel] = everyone[:numel]
        return whole.view_as(parameter)


class SharedStateModel(ReplicatedModel):
    """A model under ZeRO-1 or 2: the engine cuts the optimizer's state into flat pieces that run across parameters."""

    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        whole = torch.zeros(parameter.numel(), device=parameter.device)
        start, piece = self._piece(parameter, kind)
        whole[start : start + piece.numel()] = piece
        dist.all_reduce(whole, group=self.topology.dp_group)
        return whole.view_as(parameter)

    def set_whole(self, parameter: Any, kind: str, whole: torch.Tensor) -> None:
        start, piece = self._piece(parameter, kind)
        piece.copy_(whole.view(-1)[start : start + piece.numel()])

    def _piece(self, parameter: Any, kind: str) -> tuple[int, torch.Tensor]:
        """Where in the flat slice this rank's piece of its state begins, and the piece, a view of the optimizer's."""
        fragment = parameter._hp_mapping
        if fragment is None:  # it lies in other data-parallel ranks' pieces
            return 0, torch.empty(0, device=parameter.device)
        # Not by the engine's safe_get_full_optimizer_state: at its first step it links the first group's moments only.
        _, flat = self.optimized_tensors()[fragment.param_group_index]
        state = flat.detach() if kind == FP32 else self.engine.optimizer.optimizer.state[flat][kind]
        address = fragment.hp_fragment_address
        return fragment.lp_fragment_address.start, state[address.start : address.start + address.numel]

    def gradient(self, parameter: Any) -> torch.Tensor | None:
        whole: torch.Tensor | None = safe_get_full_grad(parameter)
        return whole

    def counted_gradient(self, parameter: Any) -> torch.Tensor | None:
        fragment = parameter._hp_mapping
        if fragment is None:
            return None
        if self.offloaded:
            return self.offloaded_norm(parameter)
        piece: torch.Tensor = fragment.get_lp_grad_fragment(parameter._index_in_param_group)
        return piece

    def optimized_tensors(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, tensor) for group in self.engine.optimizer.param_groups for tensor in group["params"]]

    def members(self) -> list[list[Any]]:
        optimizer = self.engine.optimizer  # BF16_Optimizer, of stage 1 in bf16, has another name for them
        found: list[list[Any]] = getattr(optimizer, "bf16_groups", None) or optimizer.bit16_groups
        return found

    def after_update(self, applied: bool) -> None:
        if not applied and self.offloaded:  # in bf16 the engine would add the next update's gradients to these
            for group in self.engine.optimizer.averaged_gradients:
                self.engine.optimizer.averaged_gradients[group] = None

    @property
    def offloaded(self) -> bool:
        """Whether the optimizer's state is on the CPU, which BF16_Optimizer (stage 1 in bf16) knows nothing of."""
        return getattr(self.engine.optimizer, "cpu_offload", False)


class WholeStateModel(ReplicatedModel):
    """A model at stage 0: every data-parallel rank has all of the optimizer's state."""

    @classmethod
    def optimizer(cls, model: nn.Module, make: MakeOptimizer, config: Config, topology: Topology) -> Any:
        # The engine knows an optimizer by its class or takes a callable; ours is no torch.optim.Optimizer.
        return lambda _: ReplicatedOptimizer(model, make, config, topology)

    @property
    def masters(self) -> dict[Any, torch.Tensor]:
        """The fp32 weight of each parameter."""
        masters: dict[Any, torch.Tensor] = self.engine.optimizer.masters
        return masters

    def whole(self, parameter: Any, kind: str) -> torch.Tensor:
        master = self.masters[parameter]
        found: torch.Tensor = master.detach() if kind == FP32 else self.engine.optimizer.optimizer.state[master][kind]
        return found

    def set_whole(self, parameter: Any, kind: str, whole: torch.Tensor) -> None:
        self.whole(parameter, kind).copy_(whole)

    def gradient(self, parameter: Any) -> torch.Tensor | None:
        held = self.counted_gradient(parameter)
        return None if held is None else held.clone()

    def counted_gradient(self, parameter: Any) -> torch.Tensor | None:
        return self.masters[parameter].grad

    def optimized_tensors(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        return [(group, tensor) for group in self.engine.optimizer.param_groups for tensor in group["params"]]

    def members(self) -> list[list[Any]]:
        parameters = {master: parameter for parameter, master in self.masters.items()}
        return [[parameters[master] for master in group["params"]] for group in self.engine.optimizer.param_groups]
