"""The Hub folder of a running job: all ranks write its files from the checkpoint just saved, and hold them against the
weights in memory before the folder has its name."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from xlscale.checkpoint.card import checkpoint_card
from xlscale.checkpoint.consolidate import Consolidation, checkpoint_writer
from xlscale.checkpoint.digests import file_digests, live_digest
from xlscale.checkpoint.hub import HubWriter
from xlscale.checkpoint.store import Checkpoint
from xlscale.checkpoint.tensor_file import DTYPES
from xlscale.config import ConfigError
from xlscale.config_sections import Config
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import gather_problems

log = logging.getLogger(__name__)

FAILURES = (ValueError, OSError, SafetensorError)


class ExportFailedError(Exception):
    """An export failed for want of room, or for what else a person can mend: nothing is left of it, all ranks know."""


def _fail_together(problems: list[str]) -> None:
    if found := gather_problems(problems):
        raise ExportFailedError("; ".join(found))


@dataclass(frozen=True)
class Exported:
    """A Hub folder that was written and verified."""

    folder: Path
    bytes: int
    files: int
    tensors: int
    seconds: float
    verify_seconds: float
    """Of these, for the digests of the files and of the weights in memory."""


def export_together(folder: Path, out: Path, sharded: ShardedModel, config: Config) -> Exported:
    """Write `out` from the checkpoint `folder` and compare every tensor with the live weights. Collective.

    The folder appears whole and verified, or not at all. On all ranks alike: ExportFailedError where it could not be
    written or read back, ConfigError where it was and does not hold the live weights.
    """
    started, topology, problems = time.perf_counter(), sharded.topology, list[str]()
    writer: HubWriter | None = None
    try:
        checkpoint = Checkpoint.open(folder)
        export, adapters = config.export, config.export.adapters and bool(config.model.languages)
        writer = checkpoint_writer(checkpoint, config, out, export.dtype, int(export.shard_gb * 1e9), adapters)
        if topology.is_main:
            writer.begin()
    except FAILURES as error:
        problems.append(f"export {out}: {error}")
    try:
        _fail_together(problems)
        assert writer is not None
        # Neighbours are on one machine: consecutive files go to ranks far apart, that all machines write.
        owners = {file: i * topology.world_size // len(writer.files) for i, file in enumerate(writer.files)}
        mine = [file for file, owner in owners.items() if owner == topology.rank]
        pieces = Consolidation(checkpoint).pieces
        try:
            for file in mine:
                writer.write_file(file, pieces)
        except FAILURES as error:
            problems.append(f"export {out}: {error}")
        _fail_together(problems)
        written = time.perf_counter()
        _verify(writer, mine, sharded)
        verify_seconds = time.perf_counter() - written
        if topology.is_main:
            try:
                writer.finish(checkpoint_card(checkpoint, config, config.export.dtype))
            except FAILURES as error:
                problems.append(f"export {out}: {error}")
        _fail_together(problems)
    finally:
        if topology.is_main and writer:
            writer.abandon()
    return Exported(
        writer.folder,
        writer.bytes,
        len(writer.files),
        len(writer.names),
        time.perf_counter() - started,
        verify_seconds,
    )


def _verify(writer: HubWriter, mine: list[str], sharded: ShardedModel) -> None:
    """Compare the digest of every written tensor with that of the live weights: the same error on all ranks."""
    problems: list[str] = []
    of_files: dict[str, int] = {}
    try:
        for file in mine:
            of_files |= file_digests(writer.beside / file, {ours: writer.names[ours] for ours in writer.files[file]})
    except FAILURES as error:
        problems.append(f"export {writer.folder}: {error}")
    _fail_together(problems)
    dtype = DTYPES[writer.dtype][0]
    live = {name: live_digest(sharded, name, parameter, dtype) for name, parameter in sharded.named_parameters()}
    order = sorted(live)
    sums = torch.tensor([[_signed(live[name]), _signed(of_files.get(name, 0))] for name in order])
    sums = sums.to(sharded.topology.device)
    dist.all_reduce(sums)  # wraps at 2**64, as the digests do
    wrong = [name for name, (lived, written) in zip(order, sums.tolist(), strict=True) if lived != written]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ConfigError(
            [
                f"export {writer.folder}: {', '.join(wrong[:3])}{more} of {len(order)} tensors are not the weights in "
                "memory: a disk or memory at fault; the folder was not kept, check the machine and start again from "
                "an earlier checkpoint"
            ]
        )


def _signed(number: int) -> int:
    """A number of 64 bits as torch's int64 holds it."""
    return number - (1 << 64) if number >> 63 else number
