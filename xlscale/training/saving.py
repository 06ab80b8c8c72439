"""Saving in the run: when training waits for it, the means by which checkpoints are told apart, and a disk that is full
for a while."""

import contextlib
import logging
import math
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from xlscale.checkpoint.retention import BEST, MEANS, folder_name, folders
from xlscale.checkpoint.saver import DiskFullError, Saved, Saver, States
from xlscale.config import ConfigError
from xlscale.config_sections import Config
from xlscale.parallel.sharded import ShardedModel
from xlscale.training.metrics import MetricsLog, stop
from xlscale.training.probe import probe
from xlscale.training.update import News

log = logging.getLogger(__name__)


class Saving:
    """The checkpoints of one run. The means begin anew with each that is saved, as they do in a run that resumes.

    meet, save, settle and finish are collective, between two updates; what has failed, but for a disk that is full,
    ends the run there. Left by an exception, it ends this rank's thread.
    """

    def __init__(self, sharded: ShardedModel, config: Config, metrics: MetricsLog):
        self.sharded, self.config, self.metrics = sharded, config, metrics
        self.root = config.run_dir / "checkpoints"
        self.saver = Saver(self.root, sharded, config)
        self.values: dict[str, list[float]] = {name: [] for name in BEST}
        self._taken = self.values
        """Of the save that is under way."""
        self._step, self._begun = 0, 0.0
        """Its update, and when it began."""
        self._held, self._written = 0.0, 0.0
        """Seconds for which the last save has held the training so far, and in which the last one was written."""
        self._held_since = 0.0

    def __enter__(self) -> "Saving":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind:
            self.saver.close()

    def note(self, record: dict[str, Any], fault: str) -> None:
        """An update was done, or skipped for `fault`: those say nothing about the weights."""
        for name, values in self.values.items():
            if not fault and record[name] is not None:
                values.append(record[name])

    def means(self) -> dict[str, float]:
        """Mean of each metric over the updates since the checkpoint before, without those that had none."""
        return {name: math.fsum(values) / len(values) for name, values in self.values.items() if values}

    def held_seconds(self) -> float:
        """For how long the training was held since this was asked before."""
        held, self._held_since = self._held_since, 0.0
        return held

    def expected_seconds(self) -> float:
        """What a save would take that is begun now and waited for, as the last one tells; 0 before the first."""
        if not self.saver.under_way:
            return self._held + self._written
        gone = time.monotonic() - self._begun
        written = max(self._written, gone)
        return written - gone + self._held + written

    def meet(self, news: News, step: int) -> None:
        """After update `step`, in which all ranks have told their news: what all have written counts from here."""
        if news.failed:
            self.saver.give_up()
        if self.saver.under_way and (news.failed or not news.writing):
            self.settle(step)
        elif news.failed:
            self.finish(step)

    def save(self, step: int, slot: int, states: States) -> str:
        """Save what `step` updates have made; what to say where the disk is full, which is no reason to end a run.

        It counts once it is settled, and the disk may be found full then.
        """
        self.settle(step)
        self._step, self._begun, self._held = step, time.monotonic(), 0.0
        try:
            with self._holding(step):
                states = {**states, MEANS: self.means(), "probe": probe(self.sharded, self.config)}
                self.saver.begin(step, slot, states)
        except DiskFullError as full:
            return self._full(full)
        self._taken, self.values = self.values, {name: [] for name in BEST}
        return "" if self.config.checkpoint.asynchronous else self.settle(step)

    def settle(self, step: int) -> str:
        """Wait for the save that is under way, if one is; as save()."""
        try:
            with self._holding(step):
                if self.saver.under_way:
                    # What counts must not outlive the records before it, also when the power fails.
                    self.metrics.sync()
                saved = self.saver.settle()
        except DiskFullError as full:
            self.values = {name: [*taken, *self.values[name]] for name, taken in self._taken.items()}
            return self._full(full)
        if saved:
            self._tell(saved)
        return ""

    def finish(self, step: int) -> None:
        """Wait for all that is done behind the training; nothing is under way."""
        with self._holding(step):
            self.saver.finish()

    def _tell(self, saved: Saved) -> None:
        self._written = saved.seconds
        log.info(
            "%s is saved: training was held for %.3f s, %.3f GB written in %.3f s",
            saved.folder,
            self._held,
            saved.bytes / 1e9,
            saved.seconds,
        )
        self.metrics.event(
            "checkpoint",
            self._step,
            folder=str(saved.folder),
            held_seconds=self._held,
            written_seconds=saved.seconds,
            bytes=saved.bytes,
        )

    def _full(self, full: DiskFullError) -> str:
        newest = next((path.name for path in folders(self.root)), "")
        stays = f"{newest} stays the newest" if newest else "there is none yet"
        line = f"the disk is full: checkpoint {folder_name(self._step)} is not saved, {stays}; make room ({full})"
        if self.metrics.is_main:
            log.warning("%s; it is tried again at the next one that is due", line)
        self.metrics.event("checkpoint_failed", self._step, reason=str(full), newest=newest)
        return line

    @contextlib.contextmanager
    def _holding(self, step: int) -> Iterator[None]:
        """The training waits for what is done here; what a person has to mend ends the run after update `step`."""
        started = time.monotonic()
        try:
            yield
        except ConfigError as error:
            stop(self.metrics, step, "; ".join(error.problems))
        finally:
            held = time.monotonic() - started
            self._held += held
            self._held_since += held
