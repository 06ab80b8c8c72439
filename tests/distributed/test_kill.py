"""A run of two ranks that is killed at random moments, some inside a save, ends in the bits of one that never was."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import WORKER, ConfigFor
from tests.distributed.launch import run, start, stop
from tests.distributed.test_keeping import CHANGES, contents, curve
from xlscale.checkpoint.retention import LATEST, folder_name, folders, kept, point_at
from xlscale.checkpoint.store import MANIFEST
from xlscale.config_sections import CheckpointConfig
from xlscale.training.metrics import read_events, read_metrics

EVERY = 2
KEEP = {"keep": 2, "keep_every": 10, "keep_best": 1}
SAVE_SECONDS = 0.04
"""About as long as it takes here from the beginning of a save to the end of its removals."""


def seen_saves(root: Path, seen: set[str]) -> int:
    """Count the saves that have begun, by the names of their folders."""
    seen.update(name for name in os.listdir(root) if name.endswith(".partial")) if root.is_dir() else None  # noqa: PTH208
    return len(seen)


def wait_for(moment: str, run_dir: Path, rng: random.Random, processes: list[subprocess.Popen[str]]) -> None:
    """Return at a random moment of the start, of an update, or of a save, or when a process has ended."""
    deadline = time.monotonic() + 120
    if moment == "start":
        deadline = time.monotonic() + rng.uniform(0, 4)
    begun, saves, seen = len(read_metrics(run_dir)), rng.randint(1, 3), set[str]()
    updates = rng.randint(1, 6)
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if moment == "save" and seen_saves(run_dir / "checkpoints", seen) >= saves:
            time.sleep(rng.uniform(0, SAVE_SECONDS))
            return
        if moment == "update" and len(read_metrics(run_dir)) >= begun + updates:
            time.sleep(rng.uniform(0, 0.02))
            return
        time.sleep(0.0005 if moment == "save" else 0.005)
    assert moment == "start" or time.monotonic() < deadline, f"no {moment} in two minutes"


def inside_a_save(root: Path) -> str:
    """In which part of a save the run was killed, by what it left; empty where it left nothing."""
    names = {path.name for path in root.iterdir()} if root.is_dir() else set()
    partial = [name for name in names if name.endswith(".partial")]
    if partial:
        written = {path.name for path in (root / partial[0]).iterdir()}
        if MANIFEST in written:
            return "manifest written"
        return "files written" if "tokenizer" in written else "files being written"
    if any(name.endswith(".removed") for name in names):
        return "an old one being removed"
    found = folders(root)
    if found and (not (root / LATEST).is_symlink() or (root / LATEST).readlink().name != found[0].name):
        return "renamed and not pointed to"
    return ""


def partly_removed(root: Path) -> None:
    (root / folder_name(2)).rename(root / f"{folder_name(2)}.removed")
    (root / f"{folder_name(2)}.removed" / MANIFEST).unlink()


def replaced(root: Path) -> None:
    """Checkpoint 6 was written a second time, and the first one is out of the way."""
    shutil.copytree(root / folder_name(6), root / f"{folder_name(6)}.partial")
    (root / folder_name(6)).rename(root / f"{folder_name(6)}.removed")


def partial(root: Path) -> Path:
    return (root / folder_name(6)).rename(root / f"{folder_name(6)}.partial")


# Moment of a kill -> what it makes of checkpoints 2, 4 and 6, all whole and `latest` at 4; where a start then goes on.
HALF_WAY: dict[str, tuple[Callable[[Path], object], int]] = {
    "files-written": (lambda root: (partial(root) / MANIFEST).unlink(), 4),
    "manifest-cut-short": (lambda root: os.truncate(partial(root) / MANIFEST, 100), 4),
    "manifest-written": (lambda root: partial(root), 4),
    "first-of-its-step-out-of-the-way": (replaced, 4),
    "renamed": (lambda root: None, 6),
    "link-made": (lambda root: (root / f"{LATEST}.partial-link").symlink_to(folder_name(6)), 6),
    "no-link-ever": (lambda root: (root / LATEST).unlink(), 6),
    "pointed-to": (lambda root: point_at(root / folder_name(6)), 6),
    "removal-begun": (partly_removed, 6),
    "removed": (lambda root: shutil.rmtree(root / folder_name(2)), 6),
}


def test_a_kill_between_any_two_steps_of_a_save_leaves_what_goes_on_to_the_bit(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    """What a kill leaves at each of them, made by hand from the checkpoints of a run that was not killed."""
    changes = CHANGES | {"training.total_steps": 10, "checkpoint.every": EVERY}
    configs = {name: str(tiny_config(tmp_path, name, changes)) for name in ("whole", *HALF_WAY)}
    run(2, [WORKER, configs.pop("whole")], tmp_path / "whole.log", timeout=120)
    whole = tmp_path / "whole"
    for name, (leave, _) in HALF_WAY.items():
        root = tmp_path / name / "checkpoints"
        for step in (2, 4, 6):
            shutil.copytree(whole / "checkpoints" / folder_name(step), root / folder_name(step))
        point_at(root / folder_name(4))
        shutil.copy(whole / "metrics.jsonl", tmp_path / name)
        leave(root)

    run(2, [WORKER, *configs.values()], tmp_path / "log", timeout=300)

    for name, (_, step) in HALF_WAY.items():
        root = tmp_path / name / "checkpoints"
        (resumed,) = [event["step"] for event in read_events(tmp_path / name) if event["event"] == "resume"]
        assert resumed == step, name
        assert curve(tmp_path / name) == curve(whole), name
        for later in range(step + EVERY, 11, EVERY):
            assert contents(root / folder_name(later)) == contents(whole / "checkpoints" / folder_name(later)), name
        assert (root / LATEST).readlink().name == folder_name(10)
        wanted = {LATEST, *map(folder_name, (2, 4, 6, 8, 10))} - ({folder_name(2)} if "remov" in name else set())
        assert {path.name for path in root.iterdir()} == wanted, name


@pytest.mark.parametrize(
    ("kills", "inside", "steps"),
    [(3, 1, 40), pytest.param(25, 10, 300, marks=pytest.mark.slow)],
)
def test_a_run_killed_at_random_moments_ends_in_the_bits_of_one_that_never_was(
    kills: int, inside: int, steps: int, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    rng = random.Random(7)
    changes = CHANGES | {"training.total_steps": steps, "checkpoint.every": EVERY}
    config = tiny_config(tmp_path, "killed", changes | {f"checkpoint.{key}": value for key, value in KEEP.items()})
    run_dir, root = tmp_path / "killed", tmp_path / "killed" / "checkpoints"
    moments = Counter[str]()
    for number in range(kills):
        processes = start(2, [WORKER, str(config)], tmp_path / "log")
        try:
            wait_for(("save", "update", "save", "start", "save")[number % 5], run_dir, rng, processes)
            assert all(process.poll() is None for process in processes), "it ended before it could be killed"
            for process in rng.sample(processes, 2):
                os.killpg(process.pid, signal.SIGKILL)
        finally:
            stop(processes)
        moments[inside_a_save(root)] += 1
        records, found = read_metrics(run_dir), folders(root)
        for folder in found:  # what looks whole is whole
            contents(folder)
        # A save counts before the next one is begun, which follows the record of its update.
        lost = len(records) - (int(found[0].name.removeprefix("step-")) if found else 0)
        assert lost <= 2 * EVERY, f"{lost} updates are lost at step {len(records)}"
    print(dict(moments))

    configs = [str(config), str(tiny_config(tmp_path, "whole", changes))]
    run(2, [WORKER, *configs], tmp_path / "end", timeout=300)

    assert sum(count for moment, count in moments.items() if moment) >= inside, moments
    resumed = [event for event in read_events(run_dir) if event["event"] == "resume"]
    assert len(resumed) >= sum(moments.values()) // 2
    assert curve(run_dir) == curve(tmp_path / "whole")
    assert not list(root.glob("*.broken*")) + list(root.glob("*.partial")) + list(root.glob("*.removed"))
    whole, ours = by_step(tmp_path / "whole" / "checkpoints"), by_step(root)
    means = {step: {"loss": loss} for step, loss in losses(tmp_path / "whole").items()}
    assert set(ours) == kept(means, CheckpointConfig(**KEEP))
    assert ours == {step: whole[step] for step in ours}


def by_step(root: Path) -> dict[int, dict[str, Any]]:
    """What each checkpoint holds."""
    return {int(folder.name.removeprefix("step-")): contents(folder) for folder in folders(root)}


def losses(run_dir: Path) -> dict[int, float]:
    """Mean loss of the updates before each checkpoint."""
    records = read_metrics(run_dir)
    return {
        last: sum(record["loss"] for record in records[last - EVERY : last]) / EVERY
        for last in range(EVERY, len(records) + 1, EVERY)
    }
