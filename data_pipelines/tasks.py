"""A task where it runs, on any machine: what surrounds it, and how the command learns that it failed.

It runs in the folder in which the command was given, on steps of its own, leaves a note while it is at work, and
another when it fails.
"""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

from datatrove.executor.base import PipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.stats import PipelineStats

from data_pipelines.children import die_with_pool
from data_pipelines.config import RecipeError
from data_pipelines.stages import Stage
from data_pipelines.steps.document import write_whole

ORPHANS_LIVE = 20.0  # seconds
LONGEST = 600  # characters of an error in the line that tells it


class Task:
    """A task of any executor, where it runs."""

    pipeline: list[PipelineStep]
    reraise = True

    def __init__(self, *args: Any, **settings: Any):
        super().__init__(*args, **settings)
        self.folder, self.logs = str(Path.cwd()), Path(self.logging_dir.path)  # type: ignore[attr-defined]

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> PipelineStats:
        die_with_pool()
        os.chdir(self.folder)
        running, failed = (self.logs / name / f"{rank:05d}" for name in ("running", "failed"))
        write_whole(running, f"{socket.gethostname()} {os.getpid()}")
        failed.unlink(missing_ok=True)
        # Several tasks may run in one process; what a step remembers of one is none of the next one's.
        pipeline = self.pipeline
        self.pipeline = deepcopy(pipeline)
        try:
            # The base's: Ray's writes its logs to one folder of the machine, which two runs would share.
            return PipelineExecutor._run_for_rank(self, rank, local_rank, node_rank)
        except Exception as error:
            said = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
            write_whole(failed, f"in {_place(error)}: {said}")
            if self.reraise:
                raise
            return PipelineStats()
        finally:
            self.pipeline = pipeline
            running.unlink(missing_ok=True)


def _place(error: Exception) -> str:
    """The step in which an error arose: the last one that its traceback comes by."""
    steps = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [step.name or type(step).__name__ for step in steps if isinstance(step, PipelineStep)]
    return names[-1] if names else "the executor"


def refuse_failed(stage: Stage, left: list[int], logs: Path) -> None:
    """RecipeError if tasks are left: which, where they failed and why."""
    if not left:
        return
    notes = {rank: logs / "failed" / f"{rank:05d}" for rank in left}
    rank = next((rank for rank in left if notes[rank].exists()), left[0])
    why = notes[rank].read_text("utf-8") if notes[rank].exists() else "without a word (killed, out of memory or time)"
    log = logs / "logs" / f"task_{rank:05d}.log"
    others = f" ({len(left) - 1} more are left)" if len(left) > 1 else ""
    raise RecipeError([f"{stage.name}: task {rank} of {len(stage.sizes)} failed {why}; its log is "
                       f"{log if log.exists() else logs}{others}; the same command runs what is left"])  # fmt: skip


def await_orphans(logs: Path) -> None:
    """Waits for tasks of a command that was killed: Ray's see after seconds only that it is gone."""
    deadline = time.monotonic() + ORPHANS_LIVE
    for note in (logs / "running").glob("[0-9]*"):
        while _alive(note) and time.monotonic() < deadline:
            time.sleep(0.1)
    shutil.rmtree(logs / "running", ignore_errors=True)


class WorkerDiedError(Exception):
    """A process of a pool was killed: the pool would wait for its result for ever."""


@contextlib.contextmanager
def noticed_deaths(logs: Path) -> Iterator[None]:
    """WorkerDiedError as soon as a task of this machine is at work in a process that is not there."""
    stop, main = threading.Event(), threading.main_thread().ident
    assert main == threading.get_ident(), "signals come to the main thread"

    def died(_signal: int, _frame: Any) -> None:
        raise WorkerDiedError

    def watch() -> None:
        while not stop.wait(1.0):
            if any(_alive(path) is False for path in (logs / "running").glob("[0-9]*")):
                signal.pthread_kill(main, signal.SIGUSR1)
                return

    before = signal.signal(signal.SIGUSR1, died)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)


def _alive(note: Path) -> bool | None:
    """Whether the process that wrote a note is there; None: the note is not, or it is of another machine."""
    try:
        host, pid = note.read_text().split()
        if host != socket.gethostname():
            return None
        os.kill(int(pid), 0)
    except FileNotFoundError:
        return None
    except ProcessLookupError:
        return False if note.exists() else None
    return True
