"""What the engine does silently wrong under tensor parallelism is refused: methods of it, and what a build checks."""

from collections.abc import Callable
from typing import Any, NoReturn

import deepspeed
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from packaging.version import Version

from xlscale.parallel.tensor_parallel import split_dim
from xlscale.parallel.topology import Topology

OLDEST = "0.19.8"


def check_engine(mpu: Any) -> None:
    """ValueError for an engine or a model-parallel unit with which it would train wrongly and say nothing."""
    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ValueError(
            f"deepspeed {deepspeed.__version__} applies an update that is NaN on one rank; "
            f"install deepspeed>={OLDEST} (constraints.txt names the one that was tried)"
        )
    if hasattr(mpu, "initialize_sequence_parallel"):
        raise ValueError(
            f"{mpu.__name__} has an attribute initialize_sequence_parallel, for which ZeRO drops tensor parallelism; "
            f"hand the engine an mpu without it (sequence parallelism is parallel.sequence_parallel)"
        )


def check_parameters(engine: Any, topology: Topology) -> None:
    """ValueError, naming the parameter, when one is partitioned over other ranks than its slice's, or counted wrongly.

    Called on all ranks; each checks its own.
    """
    wanted = dist.get_process_group_ranks(topology.dp_group)
    reduced = dist.get_process_group_ranks(engine.seq_data_parallel_group)
    if reduced != wanted:
        raise ValueError(
            f"the engine averages gradients over ranks {reduced}, rank {topology.rank}'s data-parallel ranks are "
            f"{wanted}; hand deepspeed.initialize the mpu of this topology"
        )
    for name, parameter in engine.module.named_parameters():
        group = getattr(parameter, "ds_process_group", None)  # only stage 3 partitions parameters
        if group is not None and dist.get_process_group_ranks(group) != wanted:
            raise ValueError(
                f"{name} is partitioned over ranks {dist.get_process_group_ranks(group)}, but rank {topology.rank} "
                f"shares its slice with {wanted}; pass data_parallel_group=topology.dp_group to zero.Init"
            )
        split = split_dim(name) is not None
        if getattr(parameter, "tensor_model_parallel", None) is not split:
            raise ValueError(
                f"{name}.tensor_model_parallel is {getattr(parameter, 'tensor_model_parallel', None)}, by TP_PLAN it "
                f"is {split}: the gradient norm would be wrong; call prepare_parameters before deepspeed.initialize"
            )


class GuardedEngine(DeepSpeedEngine):
    """The engine, without what knows nothing of tensor parallelism, and with every rank's faults seen by all."""

    before_update: Callable[[], None]
    """Called on all ranks between an update's last backward and its step."""
    after_update: Callable[[bool], None]
    """Called on all ranks after an update, with whether it was applied."""

    @classmethod
    def guard(cls, engine: DeepSpeedEngine) -> "GuardedEngine":
        """Make an engine a guarded one, in place: deepspeed.initialize lets nobody choose the class."""
        assert type(engine) is DeepSpeedEngine, type(engine)
        engine.__class__ = cls
        return engine

    def step(self, *args: Any, **kwargs: Any) -> None:
        updates = self.is_gradient_accumulation_boundary()
        if updates:
            self.before_update()
        super().step(*args, **kwargs)
        if updates:
            self.after_update(self.was_step_applied())

    def save_16bit_model(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("save_16bit_model", "writes the slices of tensor-parallel rank 0 as if they were the model", EXPORT)

    def save_fp16_model(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("save_fp16_model", "writes the slices of tensor-parallel rank 0 as if they were the model", EXPORT)

    def module_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("module_state_dict", "gives this rank's slices as if they were the model", EXPORT)

    def _consolidated_16bit_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("_consolidated_16bit_state_dict", "gathers the slices of tensor-parallel rank 0 only", EXPORT)

    def _zero3_consolidated_16bit_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("_zero3_consolidated_16bit_state_dict", "gathers the slices of tensor-parallel rank 0 only", EXPORT)

    def save_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("save_checkpoint", "writes what fits no other topology and zero_to_fp32 puts together wrongly", SAVE)

    def load_checkpoint(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("load_checkpoint", "mixes in files that another topology left", LOAD)

    def load_module_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        _refuse("load_module_state_dict", "takes a slice for the whole parameter", LOAD)


EXPORT = "`xlscale export` writes the whole model"
SAVE = "xlscale.checkpoint.saver.save writes a checkpoint that any topology reads"
LOAD = "ShardedModel.load fills the model from a checkpoint of any topology"


def _refuse(method: str, why: str, instead: str) -> NoReturn:
    raise ValueError(f"engine.{method} is refused: it {why}; {instead}")
