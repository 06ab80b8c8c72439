"""A run that is asked to end, and one that hangs: what it leaves, and the status that tells a launcher what to do."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import STEPS, WORKER, ConfigFor, shape_changes
from tests.distributed.launch import ROOT, environment, run, start, stop
from tests.distributed.test_resume import curve
from xlscale.checkpoint.newest import newest
from xlscale.config import load_config
from xlscale.training import signals
from xlscale.training.loop import train
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.signals import REQUEUE
from xlscale.training.watchdog import HUNG

ENDLESS: dict[str, Any] = {"training.total_steps": 100_000, "checkpoint.every": 0}


def await_updates(run_dir: Path, count: int, going: Callable[[], bool], log: Path) -> None:
    """Wait until a run has done `count` updates."""
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < count:
        assert time.monotonic() < deadline and going(), log.read_text()
        time.sleep(0.01)


@contextlib.contextmanager
def two_ranks(config: Path, run_dir: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """The processes of a run on two ranks, in its fourth update or a later one."""
    log = config.with_suffix(".log")
    processes = start(2, [WORKER, str(config)], log)
    try:
        await_updates(run_dir, 3, lambda: all(p.poll() is None for p in processes), Path(f"{log}.0"))
        yield processes
    finally:
        stop(processes)


def test_signal_to_one_rank_saves_on_all_at_one_update_and_the_run_goes_on_to_the_bit(
    grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path
) -> None:
    """With a loader process on each rank, to which the signal goes too."""
    changes = shape_changes("dp2-tp1") | {"checkpoint.every": 0, "data.workers": 1}
    config, run_dir = tiny_config(tmp_path, "asked", changes), tmp_path / "asked"
    with two_ranks(config, run_dir) as processes:
        os.killpg(processes[1].pid, signal.SIGUSR1)
        assert [process.wait(60) for process in processes] == [REQUEUE] * 2
    checkpoint, done = newest(run_dir / "checkpoints"), len(read_metrics(run_dir))
    assert checkpoint is not None and checkpoint.step == done < STEPS
    event = read_events(run_dir)[-1]
    assert (event["event"], event["step"], event["signal"], event["saved"]) == ("stop", done, "SIGUSR1", True)
    saved = read_events(run_dir)[-2]
    assert saved["event"] == "checkpoint" and 0 < saved["held_seconds"] < 60 and saved["written_seconds"] > 0
    assert "start it again to go on" in (run_dir / "log.txt").read_text()

    run(2, [WORKER, str(config)], tmp_path / "second.log", timeout=120)
    assert curve(run_dir) == curve(grid["dp2-tp1"])


@pytest.mark.slow
def test_signal_to_the_launch_script_is_handed_on_and_so_is_the_status(tiny_config: ConfigFor, tmp_path: Path) -> None:
    config, run_dir, log = tiny_config(tmp_path, "run", shape_changes("dp2-tp1") | ENDLESS), tmp_path / "run", "log"
    with (tmp_path / log).open("w") as output:
        process = subprocess.Popen(
            ["launch/local.sh", "2", str(config)],
            env=environment(),
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    try:
        await_updates(run_dir, 3, lambda: process.poll() is None, tmp_path / log)
        process.terminate()
        assert process.wait(60) == REQUEUE, (tmp_path / log).read_text()
    finally:
        if process.poll() is None:
            process.terminate()
            process.terminate()
            process.wait(60)
    checkpoint = newest(run_dir / "checkpoints")
    assert checkpoint is not None and checkpoint.step == len(read_metrics(run_dir))


def test_checkpoint_for_which_no_time_is_left_is_not_begun(
    tiny_config: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, which sends itself the signal; as if the last checkpoint had taken a day."""
    monkeypatch.setattr(signals, "SAVE_MARGIN", 1e9)
    changes = shape_changes("dp1-tp1") | ENDLESS | {"checkpoint.every": 2}
    config, run_dir = tiny_config(tmp_path, "late", changes), tmp_path / "late"
    over = threading.Event()

    def ask() -> None:
        await_updates(run_dir, 5, lambda: not over.is_set(), config)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        with pytest.raises(SystemExit) as ended:
            train(load_config(config))
    finally:
        over.set()
        asker.join()
    assert ended.value.code == REQUEUE
    done, event = len(read_metrics(run_dir)), read_events(run_dir)[-1]
    assert (event["event"], event["step"], event["saved"]) == ("stop", done, False)
    assert "SIGTERM: no checkpoint is written: " in event["reason"]
    assert "which is more than training.grace_seconds = 30" in event["reason"]
    assert not (run_dir / "checkpoints" / f"step-{done:08d}").exists()
    checkpoint = newest(run_dir / "checkpoints")
    assert checkpoint is not None and done - 2 <= checkpoint.step < done


@contextlib.contextmanager
def waiting_rank(grace: float, folder: Path) -> Iterator[list["subprocess.Popen[str]"]]:
    """Two ranks in an update that never ends; rank 0 waits in a collective."""
    script = str(ROOT / "tests" / "distributed" / "signal_cases.py")
    processes = start(2, [script, str(grace), str(folder)], folder / "log")
    try:
        deadline = time.monotonic() + 60
        while len(list(folder.glob("ready-*"))) < 2:
            assert time.monotonic() < deadline, (folder / "log.0").read_text()
            time.sleep(0.01)
        yield processes
    finally:
        stop(processes)


def test_second_signal_ends_a_rank_in_a_collective_and_the_one_that_follows_from_it_ends_the_other(
    tmp_path: Path,
) -> None:
    with waiting_rank(30.0, tmp_path) as (rank, other):
        for _ in range(2):  # together they are one
            rank.send_signal(signal.SIGTERM)
        time.sleep(1.5)
        assert rank.poll() is None
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(5) == 128 + signal.SIGTERM
        # A launcher's way when one has ended. The other one sleeps: gloo does not tell it.
        other.send_signal(signal.SIGTERM)
        assert other.wait(5) == 128 + signal.SIGTERM


def test_update_that_does_not_end_in_time_is_given_up_with_the_status(tmp_path: Path) -> None:
    with waiting_rank(2.0, tmp_path) as (rank, _):
        rank.send_signal(signal.SIGTERM)
        assert rank.wait(5) == REQUEUE
    assert "no update has ended in time for training.grace_seconds = 2:" in (tmp_path / "log.0").read_text()


def test_rank_that_stands_still_ends_the_job_with_the_stacks_of_the_waiting_one(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    changes = shape_changes("dp2-tp1") | ENDLESS | {"training.hang_seconds": 4.0}
    config, run_dir = tiny_config(tmp_path, "hangs", changes), tmp_path / "hangs"
    with two_ranks(config, run_dir) as processes:
        processes[1].send_signal(signal.SIGSTOP)
        stopped = time.monotonic()
        assert processes[0].wait(30) == HUNG
        assert 4 < time.monotonic() - stopped < 20
    stacks = (run_dir / "stacks" / "rank-0.txt").read_text()
    done = len(read_metrics(run_dir))
    assert "has lasted longer than training.hang_seconds = 4" in stacks and "in _train" in stacks
    event = read_events(run_dir)[-1]
    assert event["event"] == "hang" and event["step"] in (done, done + 1)
    assert f"rank 0's stacks are in {run_dir / 'stacks' / 'rank-0.txt'}" in (run_dir / "log.txt").read_text()
