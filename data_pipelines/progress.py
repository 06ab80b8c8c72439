"""How far the tasks are: each writes it to a small file, wherever it runs, and the command that waits for
them shows the sum.
"""

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

EVERY = 0.2  # seconds between two writes of a task, and between two looks at them
EVERY_SHARED = 5.0  # the same of a task on Slurm or Ray: thousands of them write to one file system
LOOKING = 0.05  # share of the time that looking may take


class Heartbeat:
    """A task's file: `done total`."""

    def __init__(self, path: Path, total: int, before: int = 0):
        """`before`: what the task had done, and is shown besides."""
        self.path, self.total, self.before, self._last = path, total, before, 0.0
        local = os.environ.get("DATATROVE_EXECUTOR", "LOCAL") == "LOCAL"
        self._every = EVERY if local else EVERY_SHARED
        path.parent.mkdir(parents=True, exist_ok=True)

    def beat(self, done: int) -> None:
        """Say how much is done; cheap enough for every document."""
        now = time.monotonic()
        if now - self._last > self._every or done >= self.total:
            self._last = now
            self.path.write_text(f"{self.before + done} {self.before + self.total}")


def total(folder: Path, stage: str) -> tuple[int, int]:
    """(done, total) over the tasks of a stage that have started."""
    done = of = 0
    for path in folder.glob(f"{stage}-*"):
        with contextlib.suppress(OSError, ValueError):  # being written at this moment
            one, all_ = map(int, path.read_text().split())
            done, of = done + one, of + all_
    return done, of


@contextlib.contextmanager
def shown(console: Console, folder: Path, stage: str, title: str, expected: int = 0) -> Iterator[None]:
    """A bar on a terminal, else a line at the start and one at the end; `expected`: the total if known."""
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"{title} ...")
        yield
        console.print(f"{title}: done in {time.monotonic() - started:.1f} s")
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar, stop = progress.add_task(title, total=expected or None), threading.Event()

        def follow() -> None:
            took = 0.0
            while not stop.wait(max(EVERY, took / LOOKING)):
                began = time.monotonic()
                done, of = total(folder, stage)
                took = time.monotonic() - began
                if of:
                    progress.update(bar, completed=done, total=max(of, expected))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
            progress.update(bar, completed=1, total=1)
        finally:
            stop.set()
            thread.join()
