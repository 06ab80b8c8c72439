"""A model under the engine, whatever it spreads over the data-parallel ranks: what the rest of xlscale sees of it.

A slice is what one tensor-parallel rank has of a parameter; a partition is one data-parallel rank's flat range of it.
Rows that only fill up a split vocabulary are in neither: they are zero, and nobody outside sees them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xlscale.config_sections import Config
from xlscale.models.dropout import DropoutKey
from xlscale.parallel.tensor_parallel import full_shape, split_dim
from xlscale.parallel.topology import Topology

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (FP32, *MOMENTS)
"""What a partition holds of each parameter: the fp32 weight and AdamW's two moments."""

HYPERPARAMETERS = ("weight_decay", "betas", "eps")
"""What a group of the optimizer has of its own; the rate is the schedule's."""

Rows = Callable[[str, str, int, int], torch.Tensor]
"""(kind, name, start, stop) -> those rows, along dimension 0, of the full tensor: where state comes from."""

MakeOptimizer = Callable[..., torch.optim.Optimizer]
"""(named parameters, OptimizerConfig) -> the optimizer of those parameters."""


def share(size: int, rank: int, ranks: int) -> tuple[int, int]:
    """Start and stop of one rank's share of `size` rows: equal shares rounded up, so that the last may be short."""
    each = -(-size // ranks)
    return min(rank * each, size), min((rank + 1) * each, size)


@dataclass(frozen=True)
class ShardedModel(ABC):
    """A model under the engine. What is said to be collective must be called by all ranks in the same order."""

    engine: Any
    topology: Topology
    dropout_key: DropoutKey
    deepspeed_config: dict[str, Any]

    @classmethod
    def construction(cls, topology: Topology, engine_config: dict[str, Any]) -> AbstractContextManager[Any]:
        """What the model has to be built within."""
        return nullcontext()

    @classmethod
    def optimizer(cls, model: nn.Module, make: MakeOptimizer, config: Config, topology: Topology) -> Any:
        """What the engine is given as its optimizer."""
        return make(model.named_parameters(), config.optimizer)

    @abstractmethod
    def held_shape(self, parameter: Any) -> tuple[int, ...]:
        """Shape of this rank's slice in memory, the rows that fill up a vocabulary included."""

    @abstractmethod
    def partition(self, parameter: Any) -> tuple[int, int]:
        """Start and stop of this rank's partition in the flat slice; empty past its end."""

    @abstractmethod
    def local(self, parameter: Any, kind: str) -> torch.Tensor:
        """This rank's partition, flat fp32, wherever the engine has it; moments are zero before the first update.

        In memory that the engine uses again, at the latest in the next update. Collective below stage 3.
        """

    @abstractmethod
    def read(self, parameter: Any, kind: str) -> torch.Tensor:
        """The same on the CPU, and there until the next update. Collective below stage 3."""

    @abstractmethod
    def write(self, parameter: Any, kind: str, values: torch.Tensor) -> None:
        """Set this rank's partition; the weight also in the precision of the forward pass. Collective below stage 3."""

    @abstractmethod
    def gradient(self, parameter: Any) -> torch.Tensor | None:
        """Gradient of this rank's slice as it is in memory, fp32, as the next update will use it before clipping.

        Between the last backward of an update and engine.step(); None for a frozen parameter. Collective.
        """

    @abstractmethod
    def counted_gradient(self, parameter: Any) -> torch.Tensor | None:
        """What the engine's norm is made of, in its own memory: this rank's piece of the gradient, None for nothing.

        Of an optimizer that is offloaded it is the piece's norm.
        """

    @abstractmethod
    def optimized_tensors(self) -> list[tuple[dict[str, Any], torch.Tensor]]:
        """The fp32 tensors that AdamW updates on this rank, keys of its state, each with its parameter group."""

    @abstractmethod
    def members(self) -> list[list[Any]]:
        """The parameters in each of the optimizer's groups, as the engine has them."""

    def groups(self) -> dict[str, dict[str, Any]]:
        """Name of each of the optimizer's groups -> HYPERPARAMETERS, as the engine has them now."""
        return {
            group["name"]: {key: list(group[key]) if key == "betas" else group[key] for key in HYPERPARAMETERS}
            for group in self.engine.optimizer.param_groups
        }

    def group_names(self) -> dict[str, str]:
        """Parameter -> name of its group; frozen ones are in none."""
        groups = {p: name for name, members in zip(self.groups(), self.members(), strict=True) for p in members}
        return {name: groups[p] for name, p in self.named_parameters() if p in groups}

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Every parameter once, in one order on all ranks."""
        yield from self.engine.module.named_parameters()

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every whole parameter by name."""
        return dict(self._full_shapes)

    @cached_property
    def _full_shapes(self) -> dict[str, tuple[int, ...]]:
        tp, vocab_size = self.topology.tp, self.engine.module.config.vocab_size
        return {name: full_shape(self.held_shape(p), name, tp, vocab_size) for name, p in self.named_parameters()}

    @cached_property
    def slices(self) -> dict[Any, tuple[int, ...]]:
        """Shape of this rank's slice of each parameter."""
        found = {}
        for name, parameter in self.named_parameters():
            shape, dim = list(self._full_shapes[name]), split_dim(name)
            if dim is not None:
                start, stop = share(shape[dim], self.topology.tp_rank, self.topology.tp)
                shape[dim] = stop - start
            found[parameter] = tuple(shape)
        return found

    @property
    def grad_norm(self) -> float:
        """L2 norm of the last update's whole gradient before clipping; not finite when the update was skipped."""
        norm = self.engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    @property
    def skipped_updates(self) -> int:
        """Updates that were not applied since the engine was built, because their gradient was not finite."""
        return int(self.engine.skipped_steps)

    @property
    def optimizer_steps(self) -> int:
        """Updates that AdamW has applied: its bias correction depends on it. Those of no adapter."""
        return self._steps().get("", 0)

    @property
    def language_steps(self) -> dict[str, int]:
        """The same of the adapters of each language."""
        return {language: steps for language, steps in self._steps().items() if language}

    def _steps(self) -> dict[str, int]:
        state = self.engine.optimizer.optimizer.state
        return {
            group.get("language", ""): int(state[tensor]["step"])
            for group, tensor in self.optimized_tensors()
            if tensor in state
        }

    def train_adapters(self, languages: Collection[str]) -> None:
        """Say, before an update's first backward, whose adapters it trains: the same on all ranks.

        Those of other languages stay as they are to the bit, with their moments and their count of updates.
        """
        for group in self.engine.optimizer.param_groups:
            group["present"] = group.get("language", "") in ("", *languages)

    def after_update(self, applied: bool) -> None:
        """What has to be tidied up after an update: nothing, where nothing else is said."""
        return

    def offloaded_norm(self, parameter: Any) -> torch.Tensor | None:
        """The norm of this rank's piece of the gradient, which the engine notes as it offloads the piece."""
        norm: torch.Tensor | None = self.engine.optimizer.norm_for_param_grads.get(
            self.engine.optimizer.get_param_id(parameter)
        )
        return norm

    def load(self, rows: Rows, optimizer_steps: int = 0, language_steps: Mapping[str, int] | None = None) -> None:
        """Fill every partition from `rows`; the moments too when an update was done, on any topology. Collective.

        optimizer_steps, language_steps: as the properties of these names gave them.
        """
        steps = {"": optimizer_steps, **(language_steps or {})}
        kinds = KINDS if any(steps.values()) else (FP32,)
        # AdamW makes its state in its first step: of adapters that is not everyone's at once.
        if len(kinds) > 1 or self.engine.module.config.languages:
            self.make_optimizer_state(steps)
        with self.writing():
            for name, parameter in self.named_parameters():
                for kind in kinds:
                    self.write(parameter, kind, self.partition_of(rows, kind, name, parameter))

    def partition_of(self, rows: Rows, kind: str, name: str, parameter: Any) -> torch.Tensor:
        """This rank's partition cut out of the full tensor; reads only the rows that it touches."""
        shape = self.slices[parameter]
        width = prod(shape[1:])
        start, stop = self.partition(parameter)
        first, last = start // width, -(-stop // width)
        dim = split_dim(name)
        if dim == 0:
            offset, _ = share(self._full_shapes[name][0], self.topology.tp_rank, self.topology.tp)
            block = rows(kind, name, offset + first, offset + last)
        else:
            block = rows(kind, name, first, last)
            if dim == 1:
                block = block[:, shape[1] * self.topology.tp_rank : shape[1] * (self.topology.tp_rank + 1)]
        return block.reshape(-1)[start - first * width : stop - first * width]

    def make_optimizer_state(self, steps: Mapping[str, int]) -> None:
        """AdamW makes its state in its first step; a resumed run needs it before that. `steps`: by language."""
        for group, tensor in self.optimized_tensors():
            self.make_state_of(tensor, steps.get(group.get("language", ""), 0))

    def make_state_of(self, tensor: torch.Tensor, steps: int) -> None:
        """AdamW's state of one tensor after `steps` updates, its moments to be filled."""
        self.engine.optimizer.optimizer.state[tensor] = {
            "step": torch.tensor(float(steps), device=tensor.device),
            **{kind: torch.zeros_like(tensor) for kind in MOMENTS},
        }

    def writing(self) -> AbstractContextManager[None]:
        """What write() has to be called within."""
        return nullcontext()

    def before_update(self) -> None:
        """What has to be done between an update's last backward and its step. Collective."""
        self.spread_faults()

    def spread_faults(self) -> None:
        """Let a value that is not finite in any rank's gradient be seen by all ranks' norms. Collective.

        The engine takes the replicated parameters' gradients from tensor-parallel rank 0 only, and would apply what
        another rank alone has.
        """
        if self.topology.tp == 1:
            return
        parameters = [p for _, p in self.named_parameters()]
        replicated = [p for p in parameters if not p.tensor_model_parallel] if self.topology.tp_rank else []
        uncounted = [g for g in map(self.counted_gradient, replicated) if g is not None]
        # On the device to the end: asking for each parameter's would wait for the GPU some hundred times.
        found = [g.isfinite().all().logical_not().float().to(self.topology.device) for g in uncounted]
        fault = torch.stack([torch.zeros((), device=self.topology.device), *found]).amax()
        dist.all_reduce(fault, op=dist.ReduceOp.MAX)
        if fault.item():
            for gradient in map(self.counted_gradient, parameters):
                if gradient is not None and gradient.numel():
                    gradient.view(-1)[0] = torch.nan
