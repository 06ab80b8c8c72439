"""DeepSpeed's side: the config made from our dataclasses, the engine, and each rank's own partition of every parameter.

A partition is one data-parallel rank's flat range of one tensor-parallel slice of a parameter.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from fairscale.nn.model_parallel import initialize as mpu

from xlscale.config import Config
from xlscale.models.bare import OnEncoder
from xlscale.models.dropout import DropoutKey
from xlscale.models.heads import MaskedLM
from xlscale.parallel.tensor_parallel import full_shape, mark_split_parameters, parallel_parts, split_dim
from xlscale.parallel.topology import Topology

FP32 = "fp32"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (FP32, *MOMENTS)
"""What a partition holds of each parameter: the fp32 weight and AdamW's two moments."""

Rows = Callable[[str, str, int, int], torch.Tensor]
"""(kind, name, start, stop) -> those rows, along dimension 0, of the full tensor: where state comes from."""


def deepspeed_config(config: Config, topology: Topology) -> dict[str, Any]:
    """The engine's JSON config; the only place that knows its key names."""
    training = config.training
    model = config.model
    layer = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    embedding = model.vocab_size * model.hidden_size
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, topology),
        "gradient_clipping": training.max_grad_norm,
        "bf16": {"enabled": training.precision == "bf16"},
        # A bf16 sum over many micro-steps would lose what each of them adds.
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": topology.device.type == "cuda",
            "reduce_bucket_size": max(layer // topology.tp, 1 << 20),
            # The defaults hold less than one XL layer, or than XXL's embedding: gathers would stall.
            "stage3_prefetch_bucket_size": max(2 * layer // topology.tp, 1 << 20),
            "stage3_max_live_parameters": max(2 * embedding // topology.tp + 4 * layer, 1 << 20),
        },
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }


def accumulation_steps(config: Config, topology: Topology) -> int:
    """Micro-steps of one update."""
    return config.training.global_batch_size // (config.training.micro_batch_size * topology.dp)


@dataclass(frozen=True)
class ShardedModel:
    """A model under the engine, and what is needed to find any parameter's partition on this rank."""

    engine: Any
    topology: Topology
    dropout_key: DropoutKey
    deepspeed_config: dict[str, Any]

    def named_parameters(self) -> Iterator[tuple[str, Any]]:
        """Every parameter once, in one order on all ranks, with the engine's ds_ attributes."""
        yield from self.engine.module.named_parameters()

    def full_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every whole parameter by name."""
        return {name: full_shape(p.ds_shape, name, self.topology.tp) for name, p in self.named_parameters()}

    def partition(self, parameter: Any) -> tuple[int, int]:
        """Start and stop of this rank's partition in the flat tensor-parallel slice; empty past its end."""
        size = parameter.ds_tensor.numel()
        numel = parameter.ds_numel
        start = min(self.topology.dp_rank * size, numel)
        return start, min(start + size, numel)

    def read(self, parameter: Any, kind: str) -> torch.Tensor:
        """This rank's partition, flat fp32, without the engine's padding; moments are zero before the first update."""
        start, stop = self.partition(parameter)
        if kind == FP32:
            local = safe_get_local_fp32_param(parameter)
        elif self.engine.optimizer.optimizer.state:
            local = safe_get_local_optimizer_state(parameter, kind)
        else:
            local = torch.zeros(stop - start)
        return local[: stop - start]

    def write(self, parameter: Any, kind: str, values: torch.Tensor) -> None:
        """Set this rank's partition; the weight also in the precision that the forward pass uses."""
        working: torch.Tensor = parameter.ds_tensor
        padded = torch.zeros(working.numel())
        padded[: values.numel()] = values
        if kind == FP32:
            safe_set_local_fp32_param(parameter, padded)
            working.copy_(padded)  # the engine leaves it as it was
        else:
            safe_set_local_optimizer_state(parameter, padded, kind)

    @property
    def optimizer_steps(self) -> int:
        """Updates that AdamW has applied: its bias correction depends on it."""
        states = list(self.engine.optimizer.optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def load(self, rows: Rows, optimizer_steps: int = 0) -> None:
        """Fill every partition from `rows`; the moments too when `optimizer_steps` > 0, on any topology."""
        kinds = KINDS if optimizer_steps else (FP32,)
        if optimizer_steps:
            self._make_optimizer_state(optimizer_steps)
        with self._small_parameters_released():
            for name, parameter in self.named_parameters():
                for kind in kinds:
                    self.write(parameter, kind, self._slice_of(rows, kind, name, parameter))

    def _slice_of(self, rows: Rows, kind: str, name: str, parameter: Any) -> torch.Tensor:
        """This rank's partition cut out of the full tensor; reads only the rows that it touches."""
        shape = tuple(parameter.ds_shape)
        width = 1
        for size in shape[1:]:
            width *= size
        start, stop = self.partition(parameter)
        first, last = start // width, -(-stop // width)
        dim = split_dim(name)
        if dim == 0:
            offset = shape[0] * self.topology.tp_rank
            block = rows(kind, name, offset + first, offset + last)
        else:
            block = rows(kind, name, first, last)
            if dim == 1:
                block = block[:, shape[1] * self.topology.tp_rank : shape[1] * (self.topology.tp_rank + 1)]
        return block.reshape(-1)[start - first * width : stop - first * width]

    def _make_optimizer_state(self, steps: int) -> None:
        # AdamW makes its state in its first step; a resumed run needs it before that.
        optimizer = self.engine.optimizer
        for flat in optimizer.fp32_partitioned_groups_flat:
            optimizer.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{kind: torch.zeros_like(flat) for kind in MOMENTS},
            }

    @contextlib.contextmanager
    def _small_parameters_released(self) -> Iterator[None]:
        # Parameters below a threshold stay gathered between steps; what is written to their partition would not show.
        small = self.engine.optimizer.persistent_parameters
        if small:
            small[0].partition(small)
        yield
        if small:
            small[0].all_gather(small)


def build(
    config: Config,
    topology: Topology,
    optimizer: Callable[..., torch.optim.Optimizer],
    model_class: type[OnEncoder] = MaskedLM,
) -> ShardedModel:
    """A model, the masked LM if nothing is said, under ZeRO-3 and tensor parallelism, no rank ever holding all of it.

    `optimizer(named_parameters, config.optimizer)` makes the optimizer. The weights are not initialised: call load().
    """
    engine_config = deepspeed_config(config, topology)
    dropout_key = DropoutKey()
    # zero.Init does not take its group from the mpu: without data_parallel_group tensor-parallel ranks share slices.
    with deepspeed.zero.Init(
        data_parallel_group=topology.dp_group,
        config_dict_or_path=engine_config,
        mpu=mpu,
        remote_device=topology.device.type,
    ):
        model = model_class(config.model, parallel_parts(topology, dropout_key))
    mark_split_parameters(model)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer(model.named_parameters(), config.optimizer),
        config=engine_config,
        mpu=mpu,
        dist_init_required=False,
    )
    return ShardedModel(engine, topology, dropout_key, engine_config)
