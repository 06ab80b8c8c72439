"""A run that hangs: a rank has died or stands still, and the others wait in a collective for ever.

Every rank has a thread that counts the time since the main thread began what it does. Past the limit it writes all
Python stacks of its process to <run>/stacks/rank-<rank>.txt and ends it, whatever the main thread waits for; a thread
that holds the interpreter's lock while it hangs is the one thing it cannot see.
"""

import faulthandler
import logging
import os
import threading
import time
from pathlib import Path
from types import TracebackType

from xlscale.training.metrics import append_event

log = logging.getLogger(__name__)

HUNG = 70
"""Exit status (EX_SOFTWARE of sysexits.h) of a run that the watchdog ended."""
PATIENCE = 5.0
"""Seconds for the stacks of all ranks to be written: the first rank to exit makes the launcher end the others."""
TICK = 1.0
"""Seconds between two looks."""


class Watchdog:
    """Ends the process when more than `seconds` pass without a beat, from the first one on; 0 = never."""

    def __init__(self, seconds: float, run_dir: Path, rank: int):
        self._seconds, self._run_dir, self._rank = seconds, run_dir, rank
        self._doing: tuple[str, int] | None = None
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()

    def beat(self, what: str, step: int) -> None:
        """The main thread begins `what` ("update", "checkpoint", "export") of update `step`."""
        self._doing = (what, step)

    def rest(self) -> None:
        """What the main thread does from now on may take as long as it likes."""
        self._doing = None

    def _watch(self) -> None:
        tick = min(TICK, self._seconds / 10)
        waited, seen = 0.0, self._doing
        while not self._done.wait(tick):
            doing = self._doing
            # Looks are counted and not the clock read: a job that was suspended as a whole has not hung.
            waited = waited + tick if doing is seen else 0.0
            seen = doing
            if doing and waited > self._seconds:
                # In a thread of its own: what hangs may be the disk of the run folder.
                threading.Thread(target=self._tell, args=doing, name="stacks", daemon=True).start()
                time.sleep(PATIENCE)
                os._exit(HUNG)

    def _tell(self, what: str, step: int) -> None:
        problem = f"{what} {step} has lasted longer than training.hang_seconds = {self._seconds:g}"
        path = self._run_dir / "stacks" / f"rank-{self._rank}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')} rank {self._rank}: {problem}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
            os.fsync(file.fileno())
        if self._rank == 0:
            append_event(self._run_dir, "hang", step, reason=problem, stacks=str(path.parent))
        log.error("%s: rank %d's stacks are in %s; exits with status %d", problem, self._rank, path, HUNG)
