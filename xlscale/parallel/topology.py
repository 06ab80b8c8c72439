"""Process groups: which rank holds which data-parallel slice and which tensor-parallel slice."""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from xlscale.config import ConfigError
from xlscale.ports import free_port

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Topology:
    """One process's place in the grid; tensor-parallel ranks are neighbours, so they share a node."""

    dp: int
    """Data-parallel size: how many slices a global batch is cut into."""
    tp: int
    """Tensor-parallel size: how many slices a weight matrix is cut into."""
    rank: int
    """Rank in the world of dp * tp processes."""
    device: torch.device
    """Where this process computes."""
    dp_group: dist.ProcessGroup
    """The processes that hold the same tensor-parallel slice; ZeRO partitions over them."""
    tp_group: dist.ProcessGroup
    """The processes that see the same batch."""

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.dp * self.tp

    @property
    def dp_rank(self) -> int:
        """Index of this process's slice of a global batch."""
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        """Index of this process's slice of a weight matrix."""
        return self.rank % self.tp

    @property
    def is_main(self) -> bool:
        """Whether this process writes logs and metrics."""
        return self.rank == 0


def world_size_from_environment() -> int:
    """Number of processes the launcher started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _stand_in_for_the_launcher() -> None:
    """Without a launcher one process makes the world of size 1 itself."""
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
        )


def _skip_the_compiled_communication_op() -> None:
    # On a CPU deepspeed compiles a shared-memory all-reduce at the first start: a minute of g++, and a build that is
    # killed leaves a lock on which every later start waits in silence. Only its inference calls use it.
    import deepspeed.ops
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    deepspeed.ops.__dict__["__compatible_ops__"] = dict.fromkeys(ALL_OPS, False)


@contextlib.contextmanager
def process_groups(tensor_parallel: int) -> Iterator[Topology]:
    """Join the world, cut it into dp x tp groups, and leave it at the end whatever happens.

    Raises ValueError when `tensor_parallel` does not divide the number of processes.
    """
    import deepspeed
    from fairscale.nn.model_parallel import initialize as mpu

    world_size = world_size_from_environment()
    if world_size % tensor_parallel:
        # fairscale lowers the size to what fits and says nothing.
        fits = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"parallel.tensor_parallel={tensor_parallel} must divide the number of processes={world_size}; "
            f"use one of {fits}"
        )
    _stand_in_for_the_launcher()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19 still calls collectives by the names that torch 2.13 renames: one warning per call.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    else:
        _skip_the_compiled_communication_op()
    deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", auto_mpi_discovery=False, verbose=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # fairscale prints three lines a start
            mpu.initialize_model_parallel(tensor_parallel)
        yield Topology(
            dp=world_size // tensor_parallel,
            tp=tensor_parallel,
            rank=dist.get_rank(),
            device=torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu"),
            dp_group=mpu.get_data_parallel_group(),
            tp_group=mpu.get_model_parallel_group(),
        )
    finally:
        mpu.destroy_model_parallel()
        # Without it some runs abort at exit.
        if dist.is_initialized():
            dist.destroy_process_group()


Told = TypeVar("Told")


def gather_problems(problems: list[Told]) -> list[Told]:
    """What any rank finds wrong, each once, in the same order on all ranks. Collective."""
    everybody: list[list[Told]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everybody, problems)
    return list(dict.fromkeys(problem for theirs in everybody for problem in theirs))


def raise_together(problems: list[str]) -> None:
    """Raise ConfigError on all ranks when any of them has a problem, so that none waits for one that has left."""
    if found := gather_problems(problems):
        raise ConfigError(found)
