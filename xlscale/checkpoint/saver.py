"""Writing a checkpoint from all ranks: copied in one moment, written behind the training, counted once it is whole.

begin     all ranks, between two updates: each copies its partitions into its own memory, the main rank encodes the rest
write     a thread of each rank: its partition file; the main rank's also config, states, tokenizer; flushed, digested
settle    all ranks, between two later updates: manifest, rename, pointer
tidy      the main rank's thread again: what [checkpoint] does not keep is removed

One save is under way at a time, and the next one waits also for the removals. Threads write and not processes: what
outlived a rank's SIGKILL would write into a folder on which the next start works.
"""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from xlscale.checkpoint.host_buffer import HostBuffer
from xlscale.checkpoint.partition_file import Entry, PartitionFile, file_entry, partition_file
from xlscale.checkpoint.retention import folder_name, point_at, remove_leftovers, retain
from xlscale.checkpoint.states import encode_state
from xlscale.checkpoint.store import FORMAT, publish, versions
from xlscale.config import ConfigError, to_toml
from xlscale.config_sections import Config
from xlscale.data.shards import disk_is_full, fsync_path
from xlscale.parallel.sharded import KINDS, ShardedModel
from xlscale.parallel.tensor_parallel import split_dim
from xlscale.parallel.topology import gather_problems

log = logging.getLogger(__name__)

THREAD = "checkpoint"
"""Name of the thread that writes."""
LAST_WAIT = 60.0
"""Seconds in which a thread must end, once the run does: time enough for the piece that it writes, and to flush it."""

States = dict[str, dict[str, Any]]
"""Name of a file -> what it holds of the run."""


class DiskFullError(Exception):
    """No room for a checkpoint: nothing is left of it, all older ones are, and all ranks know."""


class _GivenUpError(Exception):
    """Another rank's write has failed, or the run ends without this save: no fault of this one."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that counts."""

    folder: Path
    bytes: int
    """Of all its files but the manifest."""
    seconds: float
    """In which the slowest rank has written its files."""


@dataclass(frozen=True)
class _Save:
    """One that was begun and is not settled."""

    final: Path
    manifest: dict[str, Any]
    """All but its files."""

    @property
    def partial(self) -> Path:
        return self.final.with_name(f"{self.final.name}.partial")


@dataclass(frozen=True)
class _Written:
    """What one rank has written."""

    files: dict[str, Entry]
    seconds: float


_Problem = tuple[bool, str]
"""Whether a full disk is all that is wrong, and the line."""


class Saver:
    """Writes checkpoints of one model into `root`. With [checkpoint] asynchronous = false, begin() writes too.

    begin, settle and finish are collective, and raise DiskFullError or ConfigError on all ranks alike.
    """

    def __init__(self, root: Path, sharded: ShardedModel, config: Config) -> None:
        self._root, self._sharded, self._config = root, sharded, config
        self._topology = sharded.topology
        self._threads = config.checkpoint.asynchronous
        self._ranges = {name: sharded.partition(parameter) for name, parameter in sharded.named_parameters()}
        self._buffers: dict[str, HostBuffer] = {}
        self._save: _Save | None = None
        self._behind: Future[Any] | None = None
        self._given_up = threading.Event()

    @property
    def under_way(self) -> bool:
        """Whether a save was begun and not settled; the same on all ranks."""
        return self._save is not None

    @property
    def writing(self) -> bool:
        """Whether this rank still writes."""
        return self._save is not None and self._behind is not None and not self._behind.done()

    @property
    def failed(self) -> bool:
        """Whether what this rank did behind the training has failed."""
        return self._behind is not None and self._behind.done() and self._behind.exception() is not None

    def begin(self, step: int, slot: int, states: States) -> None:
        """Take the state of this moment, and have it written as `root/step-<step>`.

        `slot`: the first slot of the next update. `states`: what else must go on; the main rank's are written.
        """
        assert self._save is None
        final = self._root / folder_name(step)
        save = _Save(final, self._manifest(step, slot))
        problems = self._end_tidying()
        try:
            if self._topology.is_main:
                remove_leftovers(self._root)
                save.partial.mkdir(parents=True)
            if self._threads and not self._buffers:
                self._allocate()
        except OSError as error:
            problems.append(_problem(save, error))
        _agree(problems, save, self._topology.is_main)
        small = {"config.toml": to_toml(self._config).encode()}
        small |= dict(encode_state(name, state) for name, state in states.items())
        tensors = self._copied() if self._threads else self._read()
        self._save = save
        self._given_up.clear()
        self._behind = _do(lambda: self._write(save.partial, tensors, small), self._threads)

    def settle(self) -> Saved | None:
        """Wait for the save that is under way, None without one, and let it count."""
        save, self._save = self._save, None
        if save is None:
            return None
        written, problems = self._outcome(save)
        everybody: list[tuple[_Written, list[_Problem]]] = [(written, problems)] * self._topology.world_size
        dist.all_gather_object(everybody, (written, problems))
        _judge([problem for _, theirs in everybody for problem in theirs], save, self._topology.is_main)
        files = {name: entry for theirs, _ in everybody for name, entry in theirs.files.items()}
        if self._topology.is_main:
            try:
                publish(save.partial, save.final, save.manifest | {"files": files})
                pointed = self._with_room(save.final, point_at, save.final)
                if pointed:
                    keep = self._config.checkpoint
                    self._behind = _do(lambda: self._with_room(save.final, retain, self._root, keep), self._threads)
            except OSError as error:
                problems.append(_problem(save, error))
        _agree(problems, save, self._topology.is_main)
        size = sum(entry["bytes"] for entry in files.values())
        return Saved(save.final, size, max(theirs.seconds for theirs, _ in everybody))

    def give_up(self) -> None:
        """Let this rank's write end early, as failed: settle() will tell why there is no such checkpoint."""
        self._given_up.set()

    def finish(self) -> None:
        """Wait for the removals after the last save."""
        assert self._save is None
        if found := gather_problems(self._end_tidying()):
            raise ConfigError([line for _, line in found])

    def close(self) -> None:
        """End this rank's thread, on whatever way out; a save that is not settled does not count. Not collective."""
        behind, self._behind, self._save = self._behind, None, None
        if behind is None:
            return
        self.give_up()
        try:
            error = behind.exception(LAST_WAIT)
        except TimeoutError as late:
            error = late
        if isinstance(error, TimeoutError):
            log.error("the disk of %s has not taken what is written for %g s; the process ends", self._root, LAST_WAIT)
        elif error is not None and not isinstance(error, _GivenUpError):
            log.error("what was written into %s behind the training has failed: %s", self._root, error)

    def _manifest(self, step: int, slot: int) -> dict[str, Any]:
        topology, sharded = self._topology, self._sharded
        groups = sharded.group_names()
        return {
            "format": FORMAT,
            "step": step,
            "slot": slot,
            "optimizer_steps": sharded.optimizer_steps,
            "language_steps": sharded.language_steps,
            "topology": {"dp": topology.dp, "tp": topology.tp, "zero_stage": self._config.parallel.zero_stage},
            "versions": versions(),
            "groups": sharded.groups(),
            "parameters": {
                name: {"shape": list(shape), "split_dim": split_dim(name), "group": groups.get(name)}
                for name, shape in sharded.full_shapes().items()
            },
        }

    def _allocate(self) -> None:
        """Memory for this rank's partitions, kept for all saves; OSError where there is none."""
        size = sum(stop - start for start, stop in self._ranges.values())
        locked = self._topology.device.type == "cuda"
        try:
            self._buffers = {kind: HostBuffer(size, locked) for kind in KINDS}
        except RuntimeError as error:
            raise OSError(
                f"{12 * size / 2**30:.1f} GiB of memory for a copy cannot be had ({error}); set "
                f"checkpoint.asynchronous = false"
            ) from None

    def _copied(self) -> list[torch.Tensor]:
        """This rank's partitions as they are now, in the order of the file, in memory that no update changes."""
        at = 0
        for name, parameter in self._sharded.named_parameters():
            for kind, buffer in self._buffers.items():
                # At once: what comes from a disk is in a buffer that the next one is read into.
                buffer.put(at, self._sharded.local(parameter, kind))
            start, stop = self._ranges[name]
            at += stop - start
        if self._topology.device.type == "cuda":
            torch.cuda.current_stream(self._topology.device).synchronize()
        return [block for kind in KINDS for block in self._buffers[kind].blocks]

    def _read(self) -> list[torch.Tensor]:
        """The same, to be written before the next update: where they can be, views."""
        parameters = [parameter for _, parameter in self._sharded.named_parameters()]
        return [self._sharded.read(parameter, kind) for kind in KINDS for parameter in parameters]

    def _write(self, partial: Path, tensors: Iterable[torch.Tensor], small: dict[str, bytes]) -> _Written:
        """Write this rank's files."""
        started = time.monotonic()
        mine = PartitionFile(partial / partition_file(self._topology.tp_rank, self._topology.dp_rank), self._ranges)
        for tensor in tensors:
            if self._given_up.is_set():
                raise _GivenUpError
            mine.write(tensor)
        files = {mine.path.name: mine.close()}
        if self._topology.is_main:
            files |= self._write_small(partial, small)
        return _Written(files, time.monotonic() - started)

    def _write_small(self, partial: Path, small: dict[str, bytes]) -> dict[str, Entry]:
        """Write the files that the main rank writes for all."""
        for name, content in small.items():
            (partial / name).write_bytes(content)
        shutil.copytree(self._config.data.tokenizer, partial / "tokenizer")
        paths = [partial / name for name in small] + sorted((partial / "tokenizer").rglob("*"))
        for path in (*paths, partial / "tokenizer"):
            fsync_path(path)
        return {str(path.relative_to(partial)): file_entry(path) for path in paths if path.is_file()}

    def _outcome(self, save: _Save) -> tuple[_Written, list[_Problem]]:
        """What this rank has written, waited for; or why it has not."""
        assert self._behind is not None
        behind, self._behind = self._behind, None
        try:
            written: _Written = behind.result()
            return written, []
        except _GivenUpError:
            return _Written({}, 0.0), []
        except Exception as error:
            if not isinstance(error, OSError):  # none of what a disk says: somebody will want to know where
                log.exception("checkpoint %s", save.final)
            return _Written({}, 0.0), [_problem(save, error, f", written by rank {self._topology.rank}")]

    def _end_tidying(self) -> list[_Problem]:
        """Wait for the removals; what went wrong with them."""
        behind, self._behind = self._behind, None
        error = behind.exception() if behind else None
        return [(False, f"checkpoints that do not stay cannot be removed from {self._root}: {error}")] if error else []

    def _with_room(self, final: Path, do: Callable[..., None], *arguments: Any) -> bool:
        """Do what a checkpoint that is whole counts without; whether there was room for it."""
        try:
            do(*arguments)
        except OSError as error:
            if not disk_is_full(error):
                raise
            log.warning("%s is saved, but there is no room to point to it or to remove older ones: %s", final, error)
            return False
        return True


def save(root: Path, sharded: ShardedModel, config: Config, step: int, slot: int, states: States) -> Path:
    """Write `root/step-<step>`, wait for it, and return it; as Saver's methods do."""
    saver = Saver(root, sharded, config)
    saver.begin(step, slot, states)
    saved = saver.settle()
    saver.finish()
    assert saved is not None
    return saved.folder


def _do(work: Callable[[], Any], behind: bool) -> "Future[Any]":
    """Do something, in a thread of its own when it is to be done `behind`."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except Exception as error:
            future.set_exception(error)

    if behind:
        # A daemon: a process that ends does not wait for ever for a disk that does not answer.
        threading.Thread(target=run, name=THREAD, daemon=True).start()
    else:
        run()
    return future


def _problem(save: _Save, error: Exception, where: str = "") -> _Problem:
    return disk_is_full(error), f"checkpoint {save.partial}{where}: {error}"


def _agree(problems: list[_Problem], save: _Save, is_main: bool) -> None:
    """Nothing when no rank has a problem. Collective."""
    _judge(gather_problems(problems), save, is_main)


def _judge(found: list[_Problem], save: _Save, is_main: bool) -> None:
    """Raise DiskFullError, and leave nothing, when that is all that any rank has found; ConfigError for all else."""
    lines = [line for _, line in found]
    if not all(full for full, _ in found):
        raise ConfigError(lines)
    if found:
        if is_main:
            shutil.rmtree(save.partial, ignore_errors=True)
        raise DiskFullError("; ".join(lines))
