"""The training loop: open the data, build or resume the model, update, log, save, export."""

import contextlib
import fcntl
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from xlscale.checkpoint.consolidate import TOKENS_SEEN
from xlscale.checkpoint.newest import take_up
from xlscale.config import ConfigError, check_topology
from xlscale.config_sections import Config
from xlscale.data.loader import Loader
from xlscale.parallel.drift import drifted
from xlscale.parallel.self_check import self_check
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import Topology, process_groups, raise_together, world_size_from_environment
from xlscale.parallel.zero import build
from xlscale.training.console import Console
from xlscale.training.data_faults import DataFaults
from xlscale.training.exports import Exports
from xlscale.training.faulty_update import report_skip
from xlscale.training.metrics import log_line, stop
from xlscale.training.optimizer import adamw
from xlscale.training.saving import Saving
from xlscale.training.signals import Signals, leave
from xlscale.training.start import (
    load_weights,
    open_stream_together,
    resume_faults,
    start_metrics,
    stream_changes,
    threads_per_process,
    wanted_shares,
)
from xlscale.training.update import News, my_slots, run_update
from xlscale.training.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config: Config) -> None:
    """Train to training.total_steps, going on from the run's newest whole checkpoint if there is one.

    Leaves the run folder described in the README. Raises ValueError for what a person can mend, and SystemExit with
    signals.REQUEUE when a signal asked for the end.
    """
    problems = check_topology(config, world_size_from_environment())
    if problems:
        raise ConfigError(problems)
    torch.set_num_threads(config.training.threads or threads_per_process())
    with (
        process_groups(config.parallel.tensor_parallel) as topology,
        _alone(config.run_dir, topology),
        Console(config.run_dir, topology.is_main) as console,
        Signals(config.training.grace_seconds) as signals,
        Watchdog(config.training.hang_seconds, config.run_dir, topology.rank) as watchdog,
    ):
        _train(config, topology, console, signals, watchdog)


@contextmanager
def _alone(run_dir: Path, topology: Topology) -> Iterator[None]:
    """Hold the run folder, until this process ends in whatever way; a second run on it is refused."""
    problems: list[str] = []
    with contextlib.ExitStack() as held:
        if topology.is_main:
            try:
                run_dir.mkdir(parents=True, exist_ok=True)
                file = held.enter_context((run_dir / ".lock").open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                problems.append(
                    f"run folder {run_dir} is in use by another run; wait for it, end its processes, "
                    f"or set another run.name"
                )
            except OSError as error:
                problems.append(f"run folder {run_dir} cannot be written into: {error}; mend that, or set run.dir")
        raise_together(problems)
        yield


def _train(config: Config, topology: Topology, console: Console, signals: Signals, watchdog: Watchdog) -> None:
    training = config.training
    stream = open_stream_together(config, topology, console)
    checkpoint = take_up(config.run_dir / "checkpoints", topology)
    accepted = stream.check_state(checkpoint.state("stream"), config.data.allow_changes) if checkpoint else []
    changes = stream_changes(checkpoint, accepted)
    faults = resume_faults(config, checkpoint)
    seen = Counter[str](checkpoint.state(TOKENS_SEEN) if checkpoint else {})
    data_faults = DataFaults(config.faults.max_replaced, checkpoint.state("data_faults") if checkpoint else {})
    if config.parallel.self_check:
        self_check(config, topology, adamw)
    sharded = build(config, topology, adamw)
    step = load_weights(sharded, checkpoint, config)
    metrics = start_metrics(config, sharded, stream, checkpoint, step, accepted)
    checkpoints = Saving(sharded, config, metrics)
    exports = Exports(config, metrics)
    watchdog.beat("export", step)
    exports.make_up(sharded, step)
    watchdog.rest()

    last = min(training.stop_after or training.total_steps, training.total_steps)
    wanted = wanted_shares(stream, step)
    loader = Loader(stream, my_slots(config, topology), config.data.workers, config.data.prefetch)

    def news() -> News:
        return News(signals.asked(), checkpoints.saver.writing, checkpoints.saver.failed)

    with loader, checkpoints, signals.at_boundaries(), console.progress(step, training.total_steps) as advance:
        while step < last:
            watchdog.beat("update", step + 1)
            if (now := wanted_shares(stream, step)) != wanted:
                wanted = now
                metrics.event("phase", step, language_probabilities=wanted)
            update = run_update(sharded, loader, config, faults, data_faults, step, news)
            record, step = update.record | {"save_seconds": checkpoints.held_seconds()}, step + 1
            metrics.update(record)
            checkpoints.note(record, update.fault)
            if not update.fault:
                seen.update(record["tokens_per_language"])
            else:
                report_skip(update, stream, config, topology, metrics)
            data_faults.tell(update.replaced, step, metrics)
            if step % config.logging.every == 0 or step == last:
                log.info("%s", log_line(record))
            advance(record)
            give_up = (update.fault and faults.give_up(step)) or (update.replaced and data_faults.give_up())
            saving = step == last or give_up or _due(step, config.checkpoint.every) or _due(step, config.export.every)
            watchdog.beat("checkpoint", step)
            checkpoints.meet(update.news, step)
            leaving = signals.leaving(topology, checkpoints.expected_seconds()) if update.news.asked else None
            if leaving:
                saving = leaving.saves
            unsaved = ""
            if saving or _due(step, config.parallel.drift_check_every):
                _stop_if_drifted(sharded, config, checkpoints, step)
            if saving:
                states = {
                    "stream": {**stream.state_dict(record["slot"]), "changes": changes},
                    "faults": faults.state_dict(),
                    "data_faults": data_faults.state_dict(),
                    TOKENS_SEEN: dict(seen),
                }
                unsaved = checkpoints.save(step, record["slot"], states)
            if step == last or give_up or leaving or _due(step, config.export.every):
                unsaved = checkpoints.settle(step) or unsaved
            if give_up := give_up or (unsaved if step == last else ""):
                stop(metrics, step, give_up)
            if leaving:
                leave(replace(leaving, late=leaving.late or unsaved), metrics, step)
            watchdog.beat("export", step)
            if _due(step, config.export.every) and not unsaved:
                exports.export(sharded, step)
    watchdog.beat("checkpoint", step)
    checkpoints.finish(step)
    watchdog.beat("export", step)
    failed = exports.last(sharded, step)
    watchdog.rest()  # an upload may take hours
    exports.finish(step)
    if failed:
        stop(metrics, step, f"{failed}; mend that and start the run again, which only exports then")
    metrics.event("stop", step)
    metrics.close()
    sharded.engine.destroy()


def _stop_if_drifted(sharded: ShardedModel, config: Config, checkpoints: Saving, step: int) -> None:
    """End the run when parameters that all tensor-parallel ranks hold alike differ; such weights are never saved."""
    if names := drifted(sharded):
        rule = "must be alike on all tensor-parallel ranks and is not any more"
        way = f"start it again, it goes on from the newest of {config.run_dir / 'checkpoints'}, and report it"
        checkpoints.settle(step)
        stop(checkpoints.metrics, step, f"{', '.join(names)} {rule}; {way}")


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
