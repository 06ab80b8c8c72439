"""A run of two ranks that is killed at random moments, some inside a save, ends in the bits of one that never was."""

import os
import random
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import WORKER, ConfigFor
from tests.distributed.launch import run, start, stop
from tests.distributed.test_keeping import CHANGES, contents, curve
from xlscale.checkpoint.retention import LATEST, folders, kept
from xlscale.checkpoint.store import MANIFEST
from xlscale.config_sections import CheckpointConfig
from xlscale.training.metrics import read_events, read_metrics

EVERY = 2
KEEP = {"keep": 2, "keep_every": 10, "keep_best": 1}
SAVE_SECONDS = 0.04
"""About as long as a save takes here, its removals included."""


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
        return "manifest written" if (root / partial[0] / MANIFEST).exists() else "files being written"
    if any(name.endswith(".removed") for name in names):
        return "an old one being removed"
    found = folders(root)
    if found and (not (root / LATEST).is_symlink() or (root / LATEST).readlink().name != found[0].name):
        return "renamed and not pointed to"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "inside", "steps"),
    [(3, 1, 40), (10, 4, 120)],
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
        # Each save comes after the record of its update, and before the next one's.
        lost = len(records) - (int(found[0].name.removeprefix("step-")) if found else 0)
        assert lost <= EVERY, f"{lost} updates are lost at step {len(records)}"
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
