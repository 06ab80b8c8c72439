"""Checkpoints that are written while training goes on: on a disk that waits for the test, and not for seconds."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from errno import EIO
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import WORKER, ConfigFor, shape_changes
from tests.distributed.launch import ROOT, run, start, stop
from tests.distributed.slow_disk_cases import slow
from tests.distributed.test_keeping import contents, curve
from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.retention import folder_name, folders
from xlscale.checkpoint.saver import THREAD
from xlscale.checkpoint.store import MANIFEST
from xlscale.config import load_config
from xlscale.training import loop
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.signals import REQUEUE
from xlscale.training.update import Update
from xlscale.training.watchdog import HUNG

SLOW_DISK = str(ROOT / "tests" / "distributed" / "slow_disk_cases.py")
STEPS, EVERY, LATE = 12, 4, 3
CHANGES = shape_changes("dp2-tp1") | {
    "training.total_steps": STEPS,
    "model.hidden_dropout_prob": 0.1,
    "checkpoint.every": EVERY,
}
AT_ONCE = {"checkpoint.asynchronous": False}
KINDS_OF_STATE: dict[str, dict[str, Any]] = {
    **{f"stage-{stage}": {"parallel.zero_stage": stage} for stage in range(4)},
    "stage-1-bf16": {"parallel.zero_stage": 1, "training.precision": "bf16"},
    "stage-3-bf16": {"training.precision": "bf16"},
    "offloaded": {"parallel.offload_optimizer": "cpu"},
}
"""What the copy is made of: views that the next update changes, pieces gathered from all ranks, offloaded state."""


def checkpoints(run_dir: Path) -> dict[str, dict[str, Any]]:
    """What each checkpoint of a run holds."""
    return {folder.name: contents(folder) for folder in folders(run_dir / "checkpoints")}


def eventually(holds: Callable[[], bool], processes: "list[subprocess.Popen[str]]", log: Path) -> None:
    """Wait until something holds, while all processes run."""
    deadline = time.monotonic() + 240
    while not holds():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes), log.read_text()
        time.sleep(0.01)


@pytest.fixture(scope="module")
def at_once(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of runs in which training waits for the disk, one for each kind of state, all their checkpoints kept."""
    root = tmp_path_factory.mktemp("at-once")
    configs = [str(tiny_config(root, name, CHANGES | kind | AT_ONCE)) for name, kind in KINDS_OF_STATE.items()]
    run(2, [WORKER, *configs], root / "log", timeout=300)
    return root


@pytest.fixture(scope="module")
def behind(at_once: Path, tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs with a disk that opens no file before three more updates are done."""
    root = tmp_path_factory.mktemp("behind")
    (root / "late").write_text(str(LATE))
    cache = {"data.cache": str(at_once / "tokens")}
    configs = [str(tiny_config(root, name, CHANGES | kind | cache)) for name, kind in KINDS_OF_STATE.items()]
    run(2, [SLOW_DISK, str(root), *configs], root / "log", timeout=300)
    return root


@pytest.mark.parametrize("kind", KINDS_OF_STATE)
def test_what_is_written_while_training_goes_on_is_the_state_of_the_moment_to_the_bit(
    kind: str, at_once: Path, behind: Path
) -> None:
    found = checkpoints(behind / kind)
    assert list(found) == [folder_name(step) for step in (12, 8, 4)]
    assert found == checkpoints(at_once / kind)
    assert curve(behind / kind) == curve(at_once / kind)


def test_training_is_held_for_less_than_is_written_and_both_are_in_the_metrics(at_once: Path, behind: Path) -> None:
    """Three updates are done while each of the first two is written, so that no clock needs to be fast."""
    for root in (at_once, behind):
        records = read_metrics(root / "stage-3")
        saves = [event for event in read_events(root / "stage-3") if event["event"] == "checkpoint"]
        assert [save["step"] for save in saves] == [4, 8, 12]
        # Records follow 4, 8 and, where the write was noticed only at the next save, that one.
        assert {record["step"] for record in records if record["save_seconds"]} == {5, 9}
        for save in saves:
            parts = (Path(save["folder"]) / name for name in os.listdir(save["folder"]))  # noqa: PTH208
            files = [path for path in parts if path.is_file() and path.name != MANIFEST]
            assert save["bytes"] > sum(path.stat().st_size for path in files)
        for save in saves[:2]:
            written, held = save["written_seconds"], save["held_seconds"]
            updates = records[save["step"] + LATE - 1]["time"] - records[save["step"]]["time"]
            if root == behind:
                assert save["time"] > records[save["step"] + LATE - 1]["time"]
                assert written > updates and held < written
            else:
                assert save["time"] < records[save["step"]]["time"] and held > written
    assert f"{folder_name(4)} is saved: training was held for " in (behind / "stage-3" / "log.txt").read_text()


@contextlib.contextmanager
def held(
    config: Path, folder: Path, ranks: tuple[int, ...] = (1,)
) -> Iterator[tuple[list["subprocess.Popen[str]"], Path]]:
    """Two ranks that train while the disk takes nothing from `ranks`; and the log of the first."""
    for rank in ranks:
        (folder / f"hold-{rank}").touch()
    processes = start(2, [SLOW_DISK, str(folder), str(config)], folder / "log")
    try:
        yield processes, folder / "log.0"
    finally:
        stop(processes)


def release(folder: Path) -> None:
    for path in folder.glob("hold-*"):
        path.unlink()


@pytest.mark.slow
def test_a_save_that_is_due_waits_for_the_one_under_way_on_any_rank(
    at_once: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config, run_dir = tiny_config(tmp_path, "run", CHANGES), tmp_path / "run"
    with held(config, tmp_path) as (processes, log):
        eventually(lambda: len(read_metrics(run_dir)) == 2 * EVERY, processes, log)
        time.sleep(1.0)
        assert len(read_metrics(run_dir)) == 2 * EVERY
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"{folder_name(EVERY)}.partial"]
        assert not (run_dir / "checkpoints" / f"{folder_name(EVERY)}.partial" / MANIFEST).exists()
        release(tmp_path)
        assert [process.wait(60) for process in processes] == [0, 0], log.read_text()
    assert checkpoints(run_dir) == checkpoints(at_once / "stage-3")
    assert curve(run_dir) == curve(at_once / "stage-3")


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_write_that_fails_on_one_rank_ends_the_run_on_all_with_one_line(
    rank: int, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config, run_dir = tiny_config(tmp_path, "run", CHANGES), tmp_path / "run"
    (tmp_path / f"fail-{rank}").write_text(str(EIO))
    with held(config, tmp_path, ranks=()) as (processes, _):
        assert [process.wait(60) for process in processes] == [1, 1]
    said = {
        next(line for line in (tmp_path / f"log.{each}").read_text().splitlines() if line.startswith("refused: "))
        for each in range(2)
    }
    done = len(read_metrics(run_dir))
    partial = run_dir / "checkpoints" / f"{folder_name(EVERY)}.partial"
    reason = f"checkpoint {partial}, written by rank {rank}: [Errno {EIO}] {os.strerror(EIO)}"
    assert said == {f"refused: stopped after update {done}: {reason}"}
    assert "Traceback" not in (tmp_path / "log.0").read_text()
    assert EVERY < done <= EVERY + 2  # the update that was under way when it failed may be one more
    event = read_events(run_dir)[-1]
    assert (event["event"], event["step"], event["reason"]) == ("stop", done, reason)
    assert newest(run_dir / "checkpoints") is None


@pytest.mark.slow
def test_a_signal_waits_for_the_write_under_way_and_saves_once_more(
    at_once: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config, run_dir = tiny_config(tmp_path, "run", CHANGES), tmp_path / "run"
    with held(config, tmp_path) as (processes, log):
        eventually(lambda: len(read_metrics(run_dir)) > EVERY, processes, log)
        processes[0].send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert [process.poll() for process in processes] == [None, None]
        assert len(read_metrics(run_dir)) <= 2 * EVERY
        release(tmp_path)
        assert [process.wait(60) for process in processes] == [REQUEUE] * 2, log.read_text()
    done = len(read_metrics(run_dir))
    found = [path.name for path in folders(run_dir / "checkpoints")]
    assert (found[0], found[-1]) == (folder_name(done), folder_name(EVERY))
    run(2, [WORKER, str(config)], tmp_path / "second.log", timeout=120)
    assert curve(run_dir) == curve(at_once / "stage-3")


@pytest.mark.slow
def test_a_run_without_time_for_a_checkpoint_still_lets_the_one_under_way_count(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    due = 200
    endless = {"training.total_steps": 100_000, "checkpoint.every": due, "training.grace_seconds": 1.0}
    config, run_dir = tiny_config(tmp_path, "run", CHANGES | endless), tmp_path / "run"
    with held(config, tmp_path) as (processes, log):
        eventually(lambda: len(read_metrics(run_dir)) > due, processes, log)
        time.sleep(1.0)  # the write under way has taken all of the grace by now
        processes[1].send_signal(signal.SIGTERM)
        time.sleep(1.0)
        assert [process.poll() for process in processes] == [None, None]
        release(tmp_path)
        assert [process.wait(60) for process in processes] == [REQUEUE] * 2, log.read_text()
    event, done = read_events(run_dir)[-1], len(read_metrics(run_dir))
    assert (event["event"], event["step"], event["saved"]) == ("stop", done, False)
    assert "SIGTERM: no checkpoint is written: " in event["reason"]
    assert [path.name for path in folders(run_dir / "checkpoints")] == [folder_name(due)]


def test_a_run_killed_while_its_disk_takes_nothing_goes_on_to_the_bit(
    at_once: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config, run_dir = tiny_config(tmp_path, "run", CHANGES), tmp_path / "run"
    with held(config, tmp_path, ranks=(0, 1)) as (processes, log):
        eventually(lambda: len(read_metrics(run_dir)) == 2 * EVERY, processes, log)
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
    root = run_dir / "checkpoints"
    assert [path.name for path in root.iterdir()] == [f"{folder_name(EVERY)}.partial"]
    run(2, [WORKER, str(config)], tmp_path / "second.log", timeout=120)
    assert curve(run_dir) == curve(at_once / "stage-3")
    assert checkpoints(run_dir) == checkpoints(at_once / "stage-3")
    assert not list(root.glob("*.partial"))


@pytest.mark.slow
def test_a_disk_that_takes_nothing_any_more_ends_the_job_with_the_stacks(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "run", CHANGES | {"training.hang_seconds": 4.0})
    with held(config, tmp_path) as (processes, log):
        assert processes[1].wait(60) == HUNG, log.read_text()
        assert processes[0].wait(60)
    assert len(read_metrics(tmp_path / "run")) == 2 * EVERY
    stacks = (tmp_path / "run" / "stacks" / "rank-1.txt").read_text()
    assert f"checkpoint {2 * EVERY} has lasted longer than training.hang_seconds = 4" in stacks
    assert "slow_disk_cases.py" in stacks and "in settle" in stacks


def test_an_error_of_the_loop_ends_the_thread_loses_no_error_of_it_and_leaves_no_half(
    at_once: Path, tiny_config: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: an update fails while the disk is held, and then the disk fails too."""
    alone = {"training.micro_batch_size": 4, "data.cache": str(at_once / "tokens")}
    config, folder = tiny_config(tmp_path, "run", CHANGES | alone), tmp_path / "disk"
    folder.mkdir()
    (folder / "hold-0").touch()
    (folder / "fail-0").write_text(str(EIO))
    run_update = loop.run_update

    def failing(*arguments: Any) -> Update:
        update = run_update(*arguments)
        if update.record["step"] == EVERY + 2:
            release(folder)
            raise RuntimeError("an update that fails")
        return update

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", slow(os.fsync, folder, "0"))
        patched.setattr(loop, "run_update", failing)
        with pytest.raises(RuntimeError, match="an update that fails"):
            loop.train(load_config(config))
    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join(10)
            assert not thread.is_alive()
    said = (tmp_path / "run" / "log.txt").read_text()
    assert f"behind the training has failed: [Errno {EIO}]" in said
    assert folders(tmp_path / "run" / "checkpoints") == []
    loop.train(load_config(config))
    assert newest(tmp_path / "run" / "checkpoints").step == STEPS  # type: ignore[union-attr]


def test_removals_that_fail_end_the_run_at_the_next_update(
    at_once: Path, tiny_config: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: what is removed is no folder, but a file of that name."""
    alone = {"training.micro_batch_size": 4, "data.cache": str(at_once / "tokens"), "checkpoint.keep": 1}
    config = load_config(tiny_config(tmp_path, "run", CHANGES | alone), ["checkpoint.every=2"])
    root = tmp_path / "run" / "checkpoints"
    run_update = loop.run_update

    def obstructing(*arguments: Any) -> Update:
        if (root / f"{folder_name(4)}.partial").exists():  # its beginning would mind
            (root / f"{folder_name(2)}.removed").write_text("no folder")
        return run_update(*arguments)

    monkeypatch.setattr(loop, "run_update", obstructing)
    with pytest.raises(ValueError, match=r"^stopped after update \d+: checkpoints that do not stay cannot be removed"):
        loop.train(config)
