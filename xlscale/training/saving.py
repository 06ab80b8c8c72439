"""Saving in the run: the means by which checkpoints are told apart, and a disk that is full for a while."""

import logging
import math
import time
from typing import Any

from xlscale.checkpoint.retention import BEST, MEANS, folder_name, folders
from xlscale.checkpoint.store import DiskFullError, save
from xlscale.config_sections import Config
from xlscale.parallel.sharded import ShardedModel
from xlscale.training.metrics import MetricsLog

log = logging.getLogger(__name__)


class Saving:
    """The checkpoints of one run. The means begin anew with each that is saved, as they do in a run that resumes."""

    def __init__(self, sharded: ShardedModel, config: Config, metrics: MetricsLog):
        self.sharded, self.config, self.metrics = sharded, config, metrics
        self.values: dict[str, list[float]] = {name: [] for name in BEST}
        self.seconds = 0.0
        """What the last one took, written or not."""

    def note(self, record: dict[str, Any], fault: str) -> None:
        """An update was done, or skipped for `fault`: those say nothing about the weights."""
        for name, values in self.values.items():
            if not fault and record[name] is not None:
                values.append(record[name])

    def means(self) -> dict[str, float]:
        """Mean of each metric over the updates since the checkpoint before, without those that had none."""
        return {name: math.fsum(values) / len(values) for name, values in self.values.items() if values}

    def save(self, step: int, slot: int, states: dict[str, dict[str, Any]]) -> str:
        """Write a checkpoint; what to say where the disk is full, which alone is no reason to end a run. Collective."""
        root, started = self.config.run_dir / "checkpoints", time.monotonic()
        try:
            folder = save(root, self.sharded, self.config, step, slot, {**states, MEANS: self.means()})
        except DiskFullError as full:
            newest = next((path.name for path in folders(root)), "")
            stays = f"{newest} stays the newest" if newest else "there is none yet"
            line = f"the disk is full: checkpoint {folder_name(step)} is not saved, {stays}; make room ({full})"
            if self.metrics.is_main:
                log.warning("%s; it is tried again at the next one that is due", line)
            self.metrics.event("checkpoint_failed", step, reason=str(full), newest=newest)
            self.seconds = time.monotonic() - started
            return line
        self.values = {name: [] for name in BEST}
        self.seconds = time.monotonic() - started
        self.metrics.event("checkpoint", step, folder=str(folder), seconds=self.seconds)
        return ""
