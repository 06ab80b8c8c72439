"""Loader processes: batches are read, tokenised, packed and masked off the training process.

What a slot holds is a pure function, so a loader process is told a step, makes its share of the rows and keeps nothing
that counts: how many processes there are, how far ahead they work and where a run goes on cannot change a batch.
"""

import contextlib
import pickle
import signal
import threading
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import SimpleQueue
from types import TracebackType

import numpy as np

from xlscale.data.child import start
from xlscale.data.sampling import micro_batch_slots
from xlscale.data.stream import Batch, Stream

READ_AHEAD = 16
"""Updates whose remote files are fetched ahead; they are large, and few are needed at a time."""
# What a launcher or a scheduler sends to all processes of a job before its end: the training process may have a
# checkpoint to write yet, and must be fed until it goes.
BLOCKED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

SlotsOf = Callable[[int], list[np.ndarray]]
"""The slots of each micro-batch of an update (from 0), alike in number."""


@dataclass(frozen=True)
class RankSlots:
    """SlotsOf for one data-parallel rank."""

    dp_rank: int
    dp: int
    accumulation: int
    micro_batch_size: int
    global_batch_size: int
    run: int = 0
    """Of sampling.micro_batch_slots."""

    def __call__(self, step: int) -> list[np.ndarray]:
        micro, whole = self.micro_batch_size, self.global_batch_size
        return [
            micro_batch_slots(step, i, self.dp_rank, self.dp, micro, whole, self.run) for i in range(self.accumulation)
        ]


class Loader:
    """A rank's batches, made by `workers` processes that live as long as the `with` block; 0 = made in this one.

    Enter it in the main thread: the kernel ends the processes with the thread that started them. `prefetch`: updates
    made ahead of the one that is asked for.
    """

    def __init__(self, stream: Stream, slots_of: SlotsOf, workers: int, prefetch: int):
        self.stream, self._slots_of, self._prefetch = stream, slots_of, prefetch
        self._workers = min(workers, len(slots_of(0)[0]))  # more than rows would have nothing to do
        self._here = _Share(stream, slots_of, 0, 1)
        self._processes: list[_Process] = []
        self._asked: deque[int] = deque()

    def __enter__(self) -> "Loader":
        with contextlib.ExitStack() as undo:
            undo.callback(self._close)
            for number in range(self._workers):
                self._processes.append(_Process(f"loader process {number + 1} of {self._workers}"))
            for index, process in enumerate(self._processes):  # all are starting by now
                process.send(_Share(self.stream, self._slots_of, index, self._workers))
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for process in self._processes:
            process.end()
        self._processes.clear()

    def batches(self, step: int) -> list[Batch]:
        """The micro-batches of update `step`; the updates after it are asked for.

        Steps usually follow each other; after any other step what was made ahead is thrown away. Raises what making
        the batches raised, and ValueError when a loader process has died.
        """
        if not self._processes:
            return self._here.make(step)
        while self._asked and self._asked[0] != step:
            self._receive()
        for ahead in range(self._asked[-1] + 1 if self._asked else step, step + self._prefetch + 1):
            for process in self._processes:
                process.send(ahead)
            self._asked.append(ahead)
        answers = self._receive()
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return [join_rows(list(parts)) for parts in zip(*answers, strict=True)]

    def _receive(self) -> list[list[Batch] | Exception]:
        """What every process has made of the step that was asked for first."""
        step = self._asked.popleft()
        answers = []
        for process in self._processes:
            made, answer = process.receive()
            assert made == step, f"asked for update {step}, got {made}"
            answers.append(answer)
        return answers


def join_rows(parts: list[Batch]) -> Batch:
    """The batch of all slots of `parts`, as the stream makes it at once."""
    if len(parts) == 1:
        return parts[0]

    def joined(arrays: list[np.ndarray | None]) -> np.ndarray | None:
        present = [array for array in arrays if array is not None]
        assert len(present) in (0, len(arrays)), "in some parts only"
        return np.concatenate(present) if present else None

    masks: list[np.ndarray | None] = [part.attention_mask for part in parts]
    if any(mask is not None for mask in masks):
        masks = [np.ones(p.input_ids.shape, bool) if m is None else m for p, m in zip(parts, masks, strict=True)]
    return Batch(
        input_ids=np.concatenate([part.input_ids for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        attention_mask=joined(masks),
        languages=np.concatenate([part.languages for part in parts]),
        slots=np.concatenate([part.slots for part in parts]),
        segments=joined([part.segments for part in parts]),
        replaced=tuple(replaced for part in parts for replaced in part.replaced),
    )


class _Share:
    """Makes the rows of one of `count` processes: the same contiguous part of every micro-batch.

    So a lane of the stream, with the chunks that it reads, stays with one process.
    """

    def __init__(self, stream: Stream, slots_of: SlotsOf, index: int, count: int):
        self.stream, self.slots_of, self.index, self.count = stream, slots_of, index, count
        self._announced = range(0)

    def make(self, step: int) -> list[Batch]:
        self._read_ahead(step)
        return [self.stream.batch(slots) for slots in self._slots(step)]

    def _slots(self, step: int) -> list[np.ndarray]:
        return [np.array_split(slots, self.count)[self.index] for slots in self.slots_of(step)]

    def _read_ahead(self, step: int) -> None:
        wanted = range(step, step + READ_AHEAD + 1)
        for ahead in wanted:
            if ahead not in self._announced:
                for slots in self._slots(ahead):
                    self.stream.read_ahead(slots)
        self._announced = wanted


class _Process:
    """A loader process, seen from the training process."""

    def __init__(self, name: str):
        self.name = name
        self._popen, self._connection = start("xlscale.data.loader", "serve", BLOCKED)

    def send(self, what: "_Share | int") -> None:
        try:
            self._connection.send(what)
        except OSError:
            raise self._died() from None

    def receive(self) -> tuple[int, list[Batch] | Exception]:
        """A step and what was made of it."""
        try:
            received: tuple[int, list[Batch] | Exception] = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        return received

    def _died(self) -> ValueError:
        # It is not started again, though it could be: what kills it is nearly always a lack of memory, and would
        # kill the next one, or the training process.
        status = self._popen.wait()
        if status < 0:
            how = f"was killed by {signal.Signals(-status).name}; if memory has run out, lower data.workers or prefetch"
        else:
            how = f"ended with status {status}; what it wrote before says why"
        return ValueError(
            f"{self.name} (process id {self._popen.pid}) {how}; start the run again, it goes on from its newest "
            f"checkpoint, and data.workers = 0 does without loader processes"
        )

    def end(self) -> None:
        """Stop it wherever it is: it holds nothing that could be left half done."""
        self._connection.close()
        self._popen.kill()
        self._popen.wait()


def serve(connection: Connection) -> None:
    """The loader process: steps in, batches out, until the training process closes the other end or is gone."""
    answers: SimpleQueue[bytes] = SimpleQueue()
    # With a thread that sends, the next update is made while the training process does not come for this one.
    threading.Thread(target=_send, args=(connection, answers), daemon=True).start()
    share: _Share = connection.recv()
    while True:
        try:
            step: int = connection.recv()
        except (EOFError, OSError):
            return
        answers.put(_answer(share, step))


def _send(connection: Connection, answers: "SimpleQueue[bytes]") -> None:
    with contextlib.suppress(OSError):
        while True:
            connection.send_bytes(answers.get())


def _answer(share: _Share, step: int) -> bytes:
    """What is sent of `step`: its micro-batches, or the error that came instead."""
    made: list[Batch] | Exception
    try:
        made = share.make(step)
    except Exception as error:
        made = _told(error)
    return pickle.dumps((step, made), pickle.HIGHEST_PROTOCOL)


def _told(error: Exception) -> Exception:
    """`error` for the training process: what our code raised for people as it is, a bug with its traceback."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, ValueError) and frames[-1].startswith("xlscale."):
        return ValueError(str(error))
    return RuntimeError("in a loader process:\n" + "".join(traceback.format_exception(error)))
