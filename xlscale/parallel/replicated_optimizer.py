"""The optimizer of ZeRO stage 0, which the engine has for fp32 without a check and for bf16 not at all.

Without ours the engine applies a gradient that is not finite, gives no norm, and refuses bf16 with fp32 accumulation.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xlscale.config_sections import Config
from xlscale.parallel.sharded import MakeOptimizer
from xlscale.parallel.topology import Topology


class ReplicatedOptimizer:
    """fp32 weights, gradients and moments of the whole slice on each rank; clips, and skips what is not finite.

    The engine reads `overflow` and `_global_grad_norm` after a step and reduces what get_grads_for_reduction gives,
    as it does with its own optimizers.
    """

    def __init__(self, model: nn.Module, make: MakeOptimizer, config: Config, topology: Topology) -> None:
        self.topology = topology
        self.max_grad_norm = config.training.max_grad_norm
        names = dict(model.named_parameters())
        self.masters: dict[Any, torch.Tensor] = {p: p for p in names.values()}
        """The fp32 weight of each parameter: itself, where the model is fp32."""
        if config.training.precision == "bf16":
            for parameter in names.values():
                self.masters[parameter] = nn.Parameter(parameter.detach().float())
                parameter.data = parameter.data.bfloat16()
                # Where a sum over many micro-steps would lose what each of them adds, fp32 takes it over at once.
                parameter.register_post_accumulate_grad_hook(partial(_accumulate, master=self.masters[parameter]))
        self.optimizer = make([(name, self.masters[p]) for name, p in names.items()], config.optimizer)
        self.overflow = False
        self._global_grad_norm = torch.nan

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """AdamW's groups; the loop sets their rate."""
        return self.optimizer.param_groups

    def get_grads_for_reduction(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """Every gradient of this rank, zero where the batch did not touch the parameter, for the engine to average."""
        for master in self.masters.values():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        return [master.grad for master in self.masters.values() if master.grad is not None], {}

    @torch.no_grad()
    def step(self) -> None:
        """Apply the accumulated gradient if it is finite on all tensor-parallel ranks, and drop it."""
        norm = self._norm()
        self.overflow = not bool(norm.isfinite())
        self._global_grad_norm = float("inf") if self.overflow else float(norm)
        if not self.overflow:
            if self.max_grad_norm:
                torch.nn.utils.clip_grads_with_norm_(self.masters.values(), self.max_grad_norm, norm)
            self.optimizer.step()
            for parameter, master in self.masters.items():
                if parameter is not master:
                    parameter.data.copy_(master)
        for master in self.masters.values():
            master.grad = None

    def _norm(self) -> torch.Tensor:
        """Global L2 norm: split parameters count on every tensor-parallel rank, replicated ones on the first."""
        counted = [
            master.grad
            for parameter, master in self.masters.items()
            if master.grad is not None and (parameter.tensor_model_parallel or self.topology.tp_rank == 0)
        ]
        square = torch.nn.utils.get_total_norm(counted).to(self.topology.device).square()
        dist.all_reduce(square, group=self.topology.tp_group)
        return square.sqrt()


def _accumulate(parameter: torch.Tensor, master: torch.Tensor) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
