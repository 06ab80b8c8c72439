"""The Hub folders of a run: when they are made, what is told of them, and their uploads."""

import logging
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist

from xlscale.checkpoint.export import ExportFailedError, export_together
from xlscale.checkpoint.push import TOKEN, Pusher
from xlscale.checkpoint.retention import folder_name
from xlscale.config_sections import Config
from xlscale.parallel.sharded import ShardedModel
from xlscale.training.metrics import MetricsLog, short

log = logging.getLogger(__name__)


class Exports:
    """Makes <run>/hub/step-XXXXXXXX of the checkpoints of a run; the main process pushes them, if at all."""

    def __init__(self, config: Config, metrics: MetricsLog):
        self._config, self._metrics = config, metrics
        self._pusher: Pusher | None = None
        self._failed: dict[int, str] = {}
        export = config.export
        if export.push_to and metrics.is_main:
            self._pusher = Pusher(export.push_to, export.push_private, export.push_hours)
            if not os.environ.get(TOKEN):
                log.warning("%s is not set, so nothing will be pushed to %s", TOKEN, export.push_to)

    def export(self, sharded: ShardedModel, step: int) -> str:
        """The Hub folder of the checkpoint after update `step`; what to say where it failed. Collective.

        That is no reason to end a run; a folder that is not the live weights is: ConfigError on all ranks.
        """
        name = folder_name(step)
        run_dir = self._config.run_dir
        if not self._main_sees(run_dir / "checkpoints" / name):
            if self._metrics.is_main:
                log.warning("there is no checkpoint of update %d, so nothing is exported", step)
            return ""
        try:
            done = export_together(run_dir / "checkpoints" / name, run_dir / "hub" / name, sharded, self._config)
        except ExportFailedError as failed:
            if self._metrics.is_main:
                log.warning("%s; it is tried again at the next one that is due", failed)
            self._metrics.event("export_failed", step, reason=str(failed))
            self._failed[step] = str(failed)
            return str(failed)
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
        log.info("exported and verified %s: %sB in %.1f s", done.folder, short(done.bytes), done.seconds)
        if self._pusher:
            self._tell(self._pusher.push(done.folder, step), step)
        return ""

    def make_up(self, sharded: ShardedModel, step: int) -> None:
        """At a start, after `step` updates: the folder that was due when the run ended before it was made. Collective.

        By a signal, for which the checkpoint is enough, by a kill, or because the export failed.
        """
        if step and self._config.export.every and step % self._config.export.every == 0:
            self.last(sharded, step)

    def last(self, sharded: ShardedModel, step: int) -> str:
        """The folder of the last update, unless it was tried or is there; what to say where it failed. Collective."""
        if step in self._failed:
            return self._failed[step]
        if self._main_sees(self._config.run_dir / "hub" / folder_name(step)):
            return ""
        return self.export(sharded, step)

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
