"""Optimizer state on a disk (ZeRO-Infinity): what it needs is made and tried before the model is, or refused clearly.

deepspeed compiles the op that reads and writes, async_io, at its first use: about two minutes of g++.
"""

import atexit
import contextlib
import ctypes
import fcntl
import logging
import mmap
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.swap_tensor.aio_config import get_aio_config

from xlscale.config_sections import Config
from xlscale.models.families import parameter_count
from xlscale.parallel.engine_config import deepspeed_config, swap_folder
from xlscale.parallel.topology import Topology, raise_together

log = logging.getLogger(__name__)

OPS = ("pin_memory", "async_io")
NVME = 'parallel.offload_optimizer = "nvme"'
OTHERWISE = 'or set parallel.offload_optimizer = "cpu"'
PROBE = 1 << 18
"""Elements written and read again before the start: 1 MiB."""


def prepare_offload(config: Config, topology: Topology) -> None:
    """Make what parallel.offload_optimizer = "nvme" needs; ConfigError on all ranks when one cannot.

    Clears this rank's swap folder, so no engine may be using it; it is removed when the process ends.
    """
    if config.parallel.offload_optimizer != "nvme":
        return
    problems: list[str] = []
    folder = swap_folder(config) / f"probe-rank{topology.rank}"
    try:
        mine = folder.parent / "zero_stage_3" / "optimizer" / f"rank{topology.rank}"  # as the engine names it
        shutil.rmtree(mine, ignore_errors=True)
        atexit.register(shutil.rmtree, mine, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        _check_room(folder, config, topology)
        handle = _async_io(get_aio_config(deepspeed_config(config, topology)))
        _lock_memory(locked_bytes(config, topology))
        _write_and_read(handle, folder)
    except OSError as error:
        problems.append(f"{NVME}: {error}; use another parallel.offload_folder, {OTHERWISE}")
    except ValueError as error:
        problems.append(str(error))
    raise_together(problems)


def locked_bytes(config: Config, topology: Topology) -> int:
    """Bytes that the engine locks in memory for what it swaps: its buffers, each of the largest group of parameters."""
    zero = deepspeed_config(config, topology)["zero_optimization"]
    largest = config.model.vocab_size * config.model.hidden_size // topology.world_size
    return int(4 * zero["offload_optimizer"]["buffer_count"] * (zero["sub_group_size"] + largest))


@contextlib.contextmanager
def swapped_in(optimizer: Any, group: int) -> Iterator[None]:
    """The ZeRO-3 optimizer's fp32 group `group` and its state in memory, and back on the disk afterwards."""
    swapped = optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def _async_io(aio: dict[str, Any]) -> Any:
    """deepspeed's async_io handle; ValueError where the op cannot be built."""
    # A build that was killed leaves a lock, and every later one waits for it in silence: ours is in a folder of its own
    # and under a lock that ends with its process.
    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "xlscale" / "extensions")))
    root.mkdir(parents=True, exist_ok=True)
    builder = get_accelerator().create_op_builder("AsyncIOBuilder")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # ninja
    with (root / "xlscale.lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for op in OPS:
            (root / op / "lock").unlink(missing_ok=True)
        if not builder.is_compatible():
            raise ValueError(
                f"{NVME} needs libaio and a C++ compiler, which were not found; apt-get install libaio-dev g++, "
                f"{OTHERWISE}"
            )
        if not (root / OPS[-1] / f"{OPS[-1]}.so").exists():
            log.info("building deepspeed's async_io in %s: about two minutes, once", root)
        try:
            op = builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{NVME}: deepspeed's async_io cannot be built in {root}: {first}; mend that, {OTHERWISE}"
            ) from error
    return op.aio_handle(
        aio["block_size"], aio["queue_depth"], aio["single_submit"], aio["overlap_events"], aio["intra_op_parallelism"]
    )


def _check_room(folder: Path, config: Config, topology: Topology) -> None:
    """ValueError where the disk cannot hold what this machine's ranks swap: the engine looks at no write's result."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or topology.world_size)
    needed = 16 * parameter_count(config.model) * ranks // topology.world_size  # fp32 weight, gradient and two moments
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{NVME} needs {needed / 2**30:.1f} GiB in {folder.parent}, and {free / 2**30:.1f} GiB are free; "
            f"make room, {OTHERWISE}"
        )


def _lock_memory(size: int) -> None:
    """ValueError where this process may not lock `size` bytes: the engine would crash on it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.closing(mmap.mmap(-1, size)) as memory:
        buffer = (ctypes.c_char * size).from_buffer(memory)
        failed = libc.mlock(ctypes.byref(buffer), ctypes.c_size_t(size))
        error = os.strerror(ctypes.get_errno())
        libc.munlock(ctypes.byref(buffer), ctypes.c_size_t(size))
        del buffer
    if failed:
        raise ValueError(
            f"{NVME} locks {size / 2**20:.0f} MiB of memory in each process, and that is refused here ({error}); raise "
            f"`ulimit -l`, {OTHERWISE}"
        )


def _write_and_read(handle: Any, folder: Path) -> None:
    """ValueError where the folder's file system cannot be written and read past the page cache (O_DIRECT)."""
    written, read = (handle.new_cpu_locked_tensor(PROBE, torch.zeros(1)) for _ in range(2))
    try:
        written.copy_(torch.arange(PROBE))
        read.zero_()
        path = str(folder / "probe")
        done = handle.async_pwrite(written, path, 0) == 0 and handle.wait() == 1
        done = done and handle.async_pread(read, path, 0) == 0 and handle.wait() == 1
        if not done or not torch.equal(written, read):
            raise ValueError(
                f"{NVME} cannot write and read {folder} directly (O_DIRECT), as some file systems over a "
                f"network; use a folder of a local disk as parallel.offload_folder, {OTHERWISE}"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for buffer in (written, read):
            handle.free_cpu_locked_tensor(buffer)
