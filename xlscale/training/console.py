"""What a person sees of a run: log.txt in the run folder, plain lines on a pipe, a progress bar on a terminal."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console as RichConsole
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LOGGER = logging.getLogger("xlscale")
SHARES = 10
"""A step without a terminal says so many times how far it is."""


class Console:
    """Log handlers of the main process; the other processes show warnings only."""

    def __init__(self, run_dir: Path, is_main: bool) -> None:
        self.is_main = is_main
        self.rich = RichConsole(stderr=True)
        self.handlers: list[logging.Handler] = []
        if is_main:
            run_dir.mkdir(parents=True, exist_ok=True)
            file = logging.FileHandler(run_dir / "log.txt", encoding="utf-8")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self.handlers.append(file)
        if self.rich.is_terminal and is_main:
            self.handlers.append(RichHandler(console=self.rich, show_path=False, show_level=False, markup=False))
        else:
            self.handlers.append(logging.StreamHandler(sys.stderr))

    def __enter__(self) -> "Console":
        LOGGER.setLevel(logging.INFO if self.is_main else logging.WARNING)
        LOGGER.propagate = False
        for handler in self.handlers:
            LOGGER.addHandler(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler in self.handlers:
            LOGGER.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk: it has been said for every line
                handler.close()

    def step(self, what: str) -> Callable[[int, int], None]:
        """A callback (done, total) that shows how far a longer step is."""
        shown = [-1]

        def report(done: int, total: int) -> None:
            share = SHARES * done // max(total, 1)
            if share > shown[0]:
                shown[0] = share
                LOGGER.info("%s: %d of %d", what, done, total)

        return report

    @contextlib.contextmanager
    def progress(self, start: int, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
        """A bar over the updates on a terminal; yields what to call with each update's metrics."""
        if not (self.is_main and self.rich.is_terminal):
            yield lambda record: None
            return
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.rich) as bar:
            task = bar.add_task("training", total=total, completed=start, loss="")

            def advance(record: dict[str, Any]) -> None:
                loss = record["loss"]
                bar.update(task, advance=1, loss="" if loss is None else f"loss {loss:.3f}")

            yield advance
