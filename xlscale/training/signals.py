"""A run that is asked to end: SIGTERM or SIGUSR1 on any rank, and one answer of all ranks at the next step boundary.

A thread notes the signal, because the main thread may wait in a collective and see nothing. That one was noted goes
with the sums that an update exchanges in any case (update.py), so that all ranks learn of it in the same update; they
write a checkpoint and exit with REQUEUE. Where there is nothing to save, before the first update and after the last
checkpoint, the process exits at once; so it does on a second signal, and where another rank of this machine has ended:
that is what the launcher sends its signal for, and no update will.
"""

import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from xlscale.parallel.topology import Topology, raise_together
from xlscale.training.metrics import MetricsLog

log = logging.getLogger(__name__)

REQUEUE = 75
"""Exit status (EX_TEMPFAIL of sysexits.h) of a run that a signal ended: the same command goes on where it was."""
IDLE, UPDATING, LEAVING = range(3)
"""Before and after the updates; while they are done; once the ranks have agreed to end."""
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_SECONDS = 1.0
"""Signals this close together are one: a launcher hands on what its children were sent already."""
LAST_MOMENT = 0.9
"""Fraction of the grace in which an update must end, or the run does without."""
SAVE_MARGIN = 1.25
"""A checkpoint is granted so many times what it is expected to take."""


@dataclass(frozen=True)
class Leaving:
    """How the run ends, the same on all ranks."""

    signal: str
    """Name of the signal."""
    waited: float
    """Seconds from the signal to the end of the update."""
    late: str
    """Why there is no time for a checkpoint; empty when one is written."""

    @property
    def saves(self) -> bool:
        return not self.late


class Signals:
    """Notes SIGTERM and SIGUSR1 within its `with` block, which all ranks enter together, in their main threads.

    `grace_seconds`: from the signal to the SIGKILL that follows, 0 = for ever.
    """

    def __init__(self, grace_seconds: float):
        self._grace = grace_seconds
        self._first: tuple[int, float] | None = None
        self._state = IDLE

    def __enter__(self) -> "Signals":
        everybody: list[tuple[str, int]] = [("", 0)] * dist.get_world_size()
        dist.all_gather_object(everybody, (socket.gethostname(), os.getpid()))
        self._here = [pid for host, pid in everybody if host == socket.gethostname() and _alive(pid)]
        # Python's own handlers run in the main thread and between two lines of it; the byte that the interpreter
        # writes to the wakeup descriptor comes at once.
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._before: dict[signal.Signals, Any] = {s: signal.signal(s, lambda *_: None) for s in SIGNALS}
        self._wakeup_before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.set_wakeup_fd(self._wakeup_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._writing)

    def _listen(self, reading: int) -> None:
        while True:
            if not select.select([reading], [], [], self._time_left())[0]:
                self._give_up()
                continue
            numbers = os.read(reading, 64)
            for number in numbers:
                if number in SIGNALS:
                    self._note(number)
            if not numbers:
                os.close(reading)
                return

    def _time_left(self) -> float | None:
        """Seconds in which the update must end; None when there is no such limit."""
        if self._first is None or not self._grace or self._state != UPDATING:
            return None
        return max(self._first[1] + self._grace * LAST_MOMENT - time.monotonic(), 0.0)

    def _give_up(self) -> None:
        """The update has not ended in time: exit with a status, which the SIGKILL would not give."""
        if self._state == UPDATING:
            log.warning(
                "no update has ended in time for training.grace_seconds = %g: exits with status %d and no checkpoint",
                self._grace,
                REQUEUE,
            )
            os._exit(REQUEUE)

    def _note(self, number: int) -> None:
        now, name = time.monotonic(), signal.Signals(number).name
        if self._first is None:
            self._first = number, now
            if not all(map(_alive, self._here)):
                os._exit(128 + number)
            if self._state == IDLE:
                log.warning("%s: there is nothing to save now; exits with status %d", name, REQUEUE)
                os._exit(REQUEUE)
            log.warning("%s: saves and exits after this update; a second signal exits at once", name)
        elif now - self._first[1] > SAME_SECONDS:
            os._exit(128 + number)

    @contextmanager
    def at_boundaries(self) -> Iterator[None]:
        """While updates are done: a signal is answered after one of them."""
        self._state = UPDATING
        try:
            yield
        finally:
            self._state = IDLE

    def asked(self) -> bool:
        """Whether this rank has had a signal."""
        return self._first is not None

    def leaving(self, topology: Topology, save_seconds: float) -> Leaving:
        """How the run ends, once all ranks know that one of them was asked; they all call it.

        `save_seconds`: what a checkpoint is expected to take that is begun now; 0 when nothing tells.
        """
        self._state = LEAVING
        now = time.monotonic()
        number, came = self._first or (0, now)
        mine = torch.tensor([number, now - came, save_seconds], dtype=torch.float64, device=topology.device)
        dist.all_reduce(mine, dist.ReduceOp.MAX)
        number, waited, save_seconds = mine.tolist()
        needed, late = SAVE_MARGIN * save_seconds, ""
        if self._grace and waited + needed > self._grace:
            late = (
                f"no checkpoint is written: {waited:.1f} s have passed and it would take {needed:.1f} s, as the last "
                f"one tells, which is more than training.grace_seconds = {self._grace:g}"
            )
        return Leaving(signal.Signals(int(number)).name, waited, late)


def _alive(pid: int) -> bool:
    """Whether a process of this machine runs; one that is stopped does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def leave(leaving: Leaving, metrics: MetricsLog, step: int) -> NoReturn:
    """End the run after update `step` and its checkpoint, on all ranks alike: SystemExit with REQUEUE."""
    reason = f"{leaving.signal}: {leaving.late or 'a checkpoint is written'}"
    if metrics.is_main:
        log.warning("stopped after update %d by %s; exit status %d, start it again to go on", step, reason, REQUEUE)
    metrics.event("stop", step, reason=reason, signal=leaving.signal, saved=leaving.saves, waited=leaving.waited)
    metrics.close()
    # The first to exit makes the launcher end the others: not before the main process has closed its files.
    raise_together([])
    raise SystemExit(REQUEUE)
