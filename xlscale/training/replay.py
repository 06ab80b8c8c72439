"""Replay: the batches of a skipped update through the run's model once more, and what in it is not finite."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import ConfigError, check_topology, load_config
from xlscale.config_sections import Config
from xlscale.data.stream import Batch
from xlscale.parallel.sharded import FP32, ShardedModel
from xlscale.parallel.tensor_parallel import split_dim
from xlscale.parallel.topology import Topology, process_groups, raise_together, world_size_from_environment
from xlscale.parallel.zero import build
from xlscale.training.faulty_update import FaultyUpdate, languages_of, read_faulty_update, rows_of
from xlscale.training.optimizer import adamw
from xlscale.training.start import load_weights, threads_per_process
from xlscale.training.update import Passed, forward_and_backward, my_slots


def replay(path: Path, overrides: list[str]) -> list[str]:
    """Forward and backward over a skipped update, without an update; gives the report's lines on the main process.

    `path` lies in the folder `faults` of its run, whose config.toml and newest checkpoint at or before the update are
    taken. `overrides`: as of load_config; the topology may be another, and with the same micro_batch_size the dropout
    is the run's. Nothing is written. Raises ConfigError for what a person can mend, on all ranks.
    """
    faulty, config = _read(path, overrides)
    run_dir = path.resolve().parent.parent
    torch.set_num_threads(config.training.threads or threads_per_process())
    with process_groups(config.parallel.tensor_parallel) as topology:
        checkpoint = newest(run_dir / "checkpoints", topology, up_to=faulty.step)
        raise_together(_none_left(run_dir, faulty) if checkpoint is None else [])
        sharded = build(config, topology, adamw)
        done = load_weights(sharded, checkpoint, config)
        first = faulty.step - 1
        batches = [rows_of(faulty.batch, slots) for slots in my_slots(config, topology)(first)]
        passed = forward_and_backward(sharded, batches, faulty.codes, faulty.seed, limit=None)
        norm, bad_gradients = _gradients(sharded)
        bad_weights = _bad_weights(sharded)
        rows = _micro_batches(batches, passed, faulty.codes, topology)
        sharded.engine.destroy()
    return [
        f"update {faulty.step} of {run_dir} was skipped: {faulty.reason} (learning rate {faulty.learning_rate:.2e})",
        f"weights: {_where(checkpoint, done, faulty.step)}",
        *_table(rows),
        f"update: loss {float(passed.loss):.6g}, gradient norm {norm:.6g}",
        *_names("weights", bad_weights, len(sharded.full_shapes())),
        *_names("gradients", bad_gradients, len(sharded.full_shapes())),
    ]


def _read(path: Path, overrides: list[str]) -> tuple[FaultyUpdate, Config]:
    """The file and its run's config, checked against each other and the number of processes."""
    try:
        faulty = read_faulty_update(path)
    except ValueError as error:
        raise ConfigError([str(error)]) from None
    file = path.resolve().parent.parent / "config.toml"
    if not file.is_file():
        raise ConfigError([f"{file} does not exist; leave {path.name} in the folder `faults` of its run"])
    config = load_config(file, overrides)
    problems = check_topology(config, world_size_from_environment())
    samples, whole = len(faulty.batch.slots), config.training.global_batch_size
    if samples != whole:
        problems.append(f"training.global_batch_size = {whole}, but {path} holds {samples} samples; set it to that")
    if problems:
        raise ConfigError(problems)
    return faulty, config


def _none_left(run_dir: Path, faulty: FaultyUpdate) -> list[str]:
    """A run without any checkpoint is replayed with its first weights; one that has later ones only is not."""
    later = newest(run_dir / "checkpoints")
    if later is None:
        return []
    return [
        f"{run_dir / 'checkpoints'} holds no whole checkpoint at or before update {faulty.step}, the newest is "
        f"{later.folder.name}; bring an earlier one back, and raise checkpoint.keep for the next time"
    ]


def _gradients(sharded: ShardedModel) -> tuple[float, list[str]]:
    """Global norm of the update's gradient, before clipping, and the parameters where it is not finite."""
    topology = sharded.topology
    names, found = [], []
    for name, parameter in sharded.named_parameters():
        gradient = sharded.gradient(parameter)
        if gradient is None:
            continue
        squares = gradient.double().square().sum()
        if split_dim(name) is None and topology.tp_rank:
            squares = torch.zeros_like(squares)  # all tensor-parallel ranks hold it: it counts once
        names.append(name)
        found.append(torch.stack([squares, (~gradient.isfinite()).any().double()]))
    totals = torch.stack(found)
    dist.all_reduce(totals, group=topology.tp_group)
    return math.sqrt(float(totals[:, 0].sum())), [name for name, row in zip(names, totals, strict=True) if row[1]]


def _bad_weights(sharded: ShardedModel) -> list[str]:
    """The parameters that are not finite themselves."""
    named = list(sharded.named_parameters())
    bad = torch.stack([(~sharded.read(parameter, FP32).isfinite()).any().double() for _, parameter in named])
    bad = bad.to(sharded.topology.device)
    dist.all_reduce(bad)
    return [name for (name, _), wrong in zip(named, bad, strict=True) if wrong]


def _micro_batches(
    batches: list[Batch], passed: Passed, codes: list[str], topology: Topology
) -> list[tuple[int, int, float, dict[str, int]]]:
    """(first slot, last slot, loss, languages) of every micro-batch of all ranks, in the order of the slots."""
    mine = [
        (int(batch.slots[0]), int(batch.slots[-1]), float(loss), languages_of(batch, codes))
        for batch, loss in zip(batches, passed.micro_losses, strict=True)
    ]
    everybody: list[Any] = [None] * topology.dp
    dist.all_gather_object(everybody, mine, group=topology.dp_group)
    return sorted(row for theirs in everybody for row in theirs)


def _where(checkpoint: Checkpoint | None, done: int, step: int) -> str:
    """At which update the weights are, and how far before the fault."""
    source = f"after update {done}, of {checkpoint.folder}" if checkpoint else "the first ones, before any update"
    missing = step - 1 - done
    if missing <= 0:  # saved after the update itself, which changed nothing
        return f"{source}: those that the update had"
    return f"{source}: {missing} update{'s' if missing > 1 else ''} before those that the update had"


def _table(rows: list[tuple[int, int, float, dict[str, int]]]) -> list[str]:
    slots = [f"{first}-{last}" for first, last, *_ in rows]
    width = max(len("slots"), *map(len, slots))
    lines = [f"{'slots':>{width}}  {'loss':>10}  finite  languages"]
    for name, (_, _, loss, languages) in zip(slots, rows, strict=True):
        told = ", ".join(f"{code} {count}" for code, count in languages.items())
        lines.append(f"{name:>{width}}  {loss:>10.5g}  {'yes' if math.isfinite(loss) else 'NO':<6}  {told}")
    return lines


def _names(what: str, bad: list[str], total: int) -> list[str]:
    """Which parameters have `what` that is not finite."""
    if len(bad) == total:
        return [f"{what} not finite: all {total} parameters"]
    return [f"{what} not finite: {len(bad)} of {total} parameters", *(f"  {name}" for name in bad)]
