"""The Hub folders of a run: when they are made, what is told of them, and their uploads."""

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from xlscale.checkpoint.export import export_together
from xlscale.checkpoint.push import TOKEN, Pusher
from xlscale.config_sections import Config
from xlscale.parallel.sharded import ShardedModel
from xlscale.training.metrics import MetricsLog

log = logging.getLogger(__name__)


class Exports:
    """Makes <run>/hub/step-XXXXXXXX of the checkpoints of a run; the main process pushes them, if at all."""

    def __init__(self, config: Config, metrics: MetricsLog):
        self._config, self._metrics = config, metrics
        self._pusher: Pusher | None = None
        export = config.export
        if export.push_to and metrics.is_main:
            self._pusher = Pusher(export.push_to, export.push_private, export.push_hours)
            if not os.environ.get(TOKEN):
                log.warning("%s is not set, so nothing will be pushed to %s", TOKEN, export.push_to)

    def export(self, sharded: ShardedModel, step: int) -> None:
        """The Hub folder of the checkpoint after update `step`. Collective."""
        name = f"step-{step:08d}"
        run_dir = self._config.run_dir
        if not self._main_sees(run_dir / "checkpoints" / name):
            if self._metrics.is_main:
                log.warning("there is no checkpoint of update %d, so nothing is exported", step)
            return
        done = export_together(run_dir / "checkpoints" / name, run_dir / "hub" / name, sharded, self._config)
        self._metrics.event(
            "export",
            step,
            folder=str(run_dir / "hub" / name),
            dtype=self._config.export.dtype,
            files=done.files,
            bytes=done.bytes,
            verified_tensors=done.tensors,
            seconds=done.seconds,
            verify_seconds=done.verify_seconds,
        )
        log.info("exported and verified %s: %.2f GB in %.1f s", done.folder, done.bytes / 1e9, done.seconds)
        if self._pusher:
            self._tell(self._pusher.push(done.folder, step), step)

    def last(self, sharded: ShardedModel, step: int) -> None:
        """The folder of the end of the run, unless it is there. Collective."""
        if not self._main_sees(self._config.run_dir / "hub" / f"step-{step:08d}"):
            self.export(sharded, step)

    def finish(self, step: int) -> None:
        """The end of the uploads, which are waited for."""
        if self._pusher:
            self._tell(self._pusher.close(), step)

    def _main_sees(self, path: Path) -> bool:
        """Whether something is there, as one process sees it: on a shared disk two may see two things. Collective."""
        there = [self._metrics.is_main and path.exists()]
        dist.broadcast_object_list(there)
        return bool(there[0])

    def _tell(self, outcomes: list[dict[str, Any]], step: int) -> None:
        for told in outcomes:
            if told["ok"]:
                log.info("pushed the weights after update %d: %s", told["of_step"], told["url"])
            else:
                way = "the run goes on, `xlscale export --push-to` sends it later"
                log.warning("push of update %d failed (%s); %s", told["of_step"], told["problem"], way)
            self._metrics.event("push", step, **told)
