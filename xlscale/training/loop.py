"""The training loop: open the data, build or resume the model, update, log, save, export."""

import contextlib
import fcntl
import json
import logging
import os
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from xlscale.checkpoint.consolidate import export_checkpoint
from xlscale.checkpoint.init_from import folder_rows
from xlscale.checkpoint.store import Checkpoint, newest, save, versions
from xlscale.config import Config, ConfigError, check_topology, to_toml
from xlscale.data.stream import Stream, open_stream
from xlscale.models.init import initial_rows
from xlscale.parallel.topology import Topology, process_groups, raise_together, world_size_from_environment
from xlscale.parallel.zero import Rows, ShardedModel, build
from xlscale.training.console import Console
from xlscale.training.metrics import MetricsLog, log_line
from xlscale.training.optimizer import adamw
from xlscale.training.update import run_update

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train to training.total_steps, going on from the run's newest whole checkpoint if there is one.

    Leaves the run folder described in the README. Raises ValueError for what a person can mend.
    """
    problems = check_topology(config, world_size_from_environment())
    if problems:
        raise ConfigError(problems)
    torch.set_num_threads(config.training.threads or _threads_per_process())
    with process_groups(config.parallel.tensor_parallel) as topology:
        console = Console(config.run_dir, topology.is_main)
        with console, _alone(config.run_dir, topology):
            _train(config, topology, console)


@contextmanager
def _alone(run_dir: Path, topology: Topology) -> Iterator[None]:
    """Hold the run folder, until this process ends in whatever way; a second run on it is refused."""
    problems: list[str] = []
    with contextlib.ExitStack() as held:
        if topology.is_main:
            file = held.enter_context((run_dir / ".lock").open("a"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problems.append(
                    f"run folder {run_dir} is in use by another run; wait for it, end its processes, "
                    f"or set another run.name"
                )
        raise_together(problems)
        yield


def _train(config: Config, topology: Topology, console: Console) -> None:
    training = config.training
    stream = _open_stream(config, topology, console)
    checkpoint = newest(config.run_dir / "checkpoints", topology)
    if checkpoint is not None:
        _check_fits(checkpoint, config, stream)
    sharded = build(config, topology, adamw)
    step = _resume(sharded, checkpoint, config)
    metrics = _start_metrics(config, sharded, stream, checkpoint, step)

    last = min(training.stop_after or training.total_steps, training.total_steps)
    skipped_in_a_row = skipped = 0
    with console.progress(step, training.total_steps) as advance:
        while step < last:
            record = run_update(sharded, stream, config, step)
            step += 1
            skipped_in_a_row = skipped_in_a_row + 1 if record.pop("skipped") else 0
            skipped += skipped_in_a_row > 0
            record["skipped_updates"] = skipped
            metrics.update(record)
            if skipped_in_a_row:
                first, end = record["slot"] - training.global_batch_size, record["slot"]
                log.warning("update %d skipped: its gradient is not finite (slots %d to %d)", step, first, end - 1)
                metrics.event("skip", step, slot=first)
            if step % config.logging.every == 0 or step == last:
                log.info("%s", log_line(record))
            advance(record)
            give_up = skipped_in_a_row >= training.max_skipped_updates
            if step == last or give_up or _due(step, config.checkpoint.every) or _due(step, config.export.every):
                slot = record["slot"]
                folder = save(config.run_dir / "checkpoints", sharded, config, step, slot, stream.state_dict(slot))
                metrics.event("checkpoint", step, folder=str(folder))
            if give_up:
                raise ConfigError(
                    [
                        f"stopped after update {step}: {skipped_in_a_row} updates in a row had a gradient that is not "
                        f"finite; lower optimizer.learning_rate, or raise training.max_skipped_updates"
                    ]
                )
            if _due(step, config.export.every):
                _export(config, topology, metrics, step)
    if not (config.run_dir / "hub" / f"step-{step:08d}").exists():
        _export(config, topology, metrics, step)
    metrics.event("stop", step)
    metrics.close()
    sharded.engine.destroy()


def _start_metrics(
    config: Config, sharded: ShardedModel, stream: Stream, checkpoint: Checkpoint | None, step: int
) -> MetricsLog:
    """The run folder's config and metrics, with an event that says what was started and what has changed since."""
    topology = sharded.topology
    if topology.is_main:
        (config.run_dir / "config.toml").write_text(to_toml(config), encoding="utf-8")
        (config.run_dir / "deepspeed.json").write_text(json.dumps(sharded.deepspeed_config, indent=1), encoding="utf-8")
    metrics = MetricsLog(config.run_dir, config, step, topology.is_main)
    changed = _changes_since(checkpoint, config) if checkpoint else []
    metrics.event(
        "resume" if checkpoint else "start",
        step,
        dp=topology.dp,
        tp=topology.tp,
        world_size=topology.world_size,
        changed=changed,
        init_from="" if checkpoint else config.training.init_from,
        language_probabilities=dict(zip(stream.languages, map(float, stream.probabilities), strict=True)),
        versions=versions(),
    )
    if checkpoint:
        total = config.training.total_steps
        log.info("resumed from %s: goes on at update %d of %d", checkpoint.folder, step + 1, total)
    if topology.is_main:
        for change in changed:
            log.warning("the config is not the checkpoint's: %s", change)
    return metrics


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _open_stream(config: Config, topology: Topology, console: Console) -> Stream:
    """The stream over the token shards, which the main process derives first where they are not there yet."""
    problems: list[str] = []
    stream: Stream | None = None
    if topology.is_main:
        try:
            stream = open_stream(config, console.step("tokenising"))
            _check_vocabulary(stream, config)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    raise_together(problems)
    return open_stream(config) if stream is None else stream


def _check_vocabulary(stream: Stream, config: Config) -> None:
    """Refuse a model with fewer rows than the tokenizer has ids."""
    if stream.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is less than the {stream.vocab_size} ids of the tokenizer "
            f"{config.data.tokenizer}; set it to {stream.vocab_size} or more"
        )


def _check_fits(checkpoint: Checkpoint, config: Config, stream: Stream) -> None:
    """Refuse to go on from a checkpoint of another model, stream or batch."""
    slot = config.training.global_batch_size * checkpoint.step
    if checkpoint.manifest["slot"] != slot:
        raise ValueError(
            f"{checkpoint.folder} stands at slot {checkpoint.manifest['slot']}, but {checkpoint.step} updates of "
            f"training.global_batch_size={config.training.global_batch_size} end at {slot}; keep a run's batch size"
        )
    stream.check_state(checkpoint.stream_state())


def _changes_since(checkpoint: Checkpoint, config: Config) -> list[str]:
    """What the config says otherwise than when the checkpoint was written; allowed, but never silent."""
    before, now = (tomllib.loads(text) for text in ((checkpoint.folder / "config.toml").read_text(), to_toml(config)))
    return [
        f"{section}.{key} was {before.get(section, {}).get(key)!r} and is {value!r}"
        for section, values in now.items()
        for key, value in values.items()
        if before.get(section, {}).get(key) != value
    ]


def _resume(sharded: ShardedModel, checkpoint: Checkpoint | None, config: Config) -> int:
    """Fill the model from the checkpoint, or with its first weights; returns the updates already done."""
    shapes = sharded.full_shapes()
    if checkpoint is None:
        _load_first_weights(sharded, config)
        return 0
    saved = {name: tuple(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    wrong = [name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name)]
    if wrong:
        name = min(wrong)
        raise ValueError(
            f"{checkpoint.folder} is of another model: {name} is {saved.get(name)} there and {shapes.get(name)} by "
            f"[model]; restore [model], or set another run.name ({len(wrong)} parameters differ)"
        )
    sharded.load(checkpoint.rows, checkpoint.manifest["optimizer_steps"])
    return checkpoint.step


def _load_first_weights(sharded: ShardedModel, config: Config) -> None:
    """Fill the model from the Hub folder training.init_from, or from the seed."""
    model, seed = config.model, config.training.seed
    shapes = sharded.full_shapes()
    if not config.training.init_from:
        sharded.load(lambda kind, name, start, stop: initial_rows(name, shapes[name], model, seed, start, stop))
        return
    problems: list[str] = []
    rows: Rows | None = None
    try:
        rows = folder_rows(config, problems)
    except (ValueError, OSError) as error:
        problems.append(str(error))
    raise_together(problems)
    assert rows is not None
    sharded.load(rows)
    raise_together(problems)  # what only the rank that read it knows
    log.info("first weights read from %s", config.training.init_from)


def _export(config: Config, topology: Topology, metrics: MetricsLog, step: int) -> None:
    """The Hub folder of the checkpoint just saved, by the main process while the others wait."""
    name = f"step-{step:08d}"
    problems: list[str] = []
    if topology.is_main:
        try:
            out = export_checkpoint(
                config.run_dir / "checkpoints" / name, config.run_dir / "hub" / name, config.export.dtype
            )
            metrics.event("export", step, folder=str(out))
        except (ValueError, OSError) as error:
            problems.append(str(error))
    raise_together(problems)


def _threads_per_process() -> int:
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, (os.cpu_count() or 1) // local)
