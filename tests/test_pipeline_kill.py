"""Runs that are killed at any moment: what they leave is whole, and the same command ends in the same bytes."""

import filecmp
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines import recipe as recipes
from data_pipelines.__main__ import main
from data_pipelines.recipe import PUBLISHED
from tests.test_pipeline import DEMO, recipe, same
from tests.test_pipeline import small as small  # the fixture

STAGES = ("read", "gather", "join", "decide", "write", "verify")
FINAL = ("documents", "archives", "gathered", "joined", "decided", "written", "verified")


def alive(session: int) -> list[str]:
    """The processes of a session that are more than zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, _, facts = path.read_text().rpartition(")")
        except OSError:
            continue
        state, _, _, its_session = facts.split()[:4]
        if int(its_session) == session and state not in "ZX":
            found.append(name)
    return found


def killed(command: list[str], output: Path, stage: str, rng: random.Random) -> bool:
    """Starts the command and kills it, alone or with its children, a moment after a task of a stage began; False if
    it had ended before.
    """
    for note in output.glob("work/*/logs/*/running/*"):  # of the run killed before
        note.unlink()
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 120
    # The work folder has another name for each recipe.
    while run.poll() is None and not any(output.glob(f"work/*/logs/{stage}/running/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 2 if stage == "read" else 0.3))  # about as long as it takes
    ended = run.poll() is not None
    if not ended:
        rng.choice((os.kill, os.killpg))(run.pid, signal.SIGKILL)
    run.wait()
    while (left := alive(run.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left
    assert not ended or run.returncode == 0
    return not ended


def finals(work: Path) -> Iterator[Path]:
    """The files in a run's work folder that stand under final names."""
    for name in FINAL:
        for path in (work / name).rglob("*"):
            relative = path.relative_to(work)
            if path.is_file() and not any(part.startswith(".") for part in relative.parts):
                yield relative


def wrong(output: Path, whole: Path) -> list[Path]:
    """Files of a killed run, published or in its work folder, that are not those of an uninterrupted one."""
    files = [path.relative_to(output) for name in PUBLISHED for path in (output / name).rglob("*") if path.is_file()]
    bad = [path for path in files if not equal(output / path, whole / path)]
    for work in output.glob("work/*"):
        before = whole / "before" / work.name
        bad += [path for path in finals(work) if not equal(work / path, before / path)]
    return bad


def equal(one: Path, other: Path) -> bool:
    """Whether both files are there with the same bytes."""
    return other.exists() and filecmp.cmp(one, other, shallow=False)


def uninterrupted(config: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run's output; in `before` its work folder as it was before it was published."""
    publish = recipes.publish

    def copy_and_publish(work: Path, out: Path) -> None:
        shutil.copytree(work, out / "before" / work.name)
        publish(work, out)

    with monkeypatch.context() as patched:
        patched.setattr(recipes, "publish", copy_and_publish)
        assert main([str(config), "--set", f"run.output={output}"]) == 0
    assert len(list(finals(next((output / "before").iterdir())))) > 50
    return output


def survives(config: Path, output: Path, whole: Path, moments: list[str], more: list[str]) -> None:
    """Kills runs of one recipe, one after the other, at these stages; a run that ends before is begun anew."""
    rng, met = random.Random(len(moments)), 0
    command = [sys.executable, "-m", "data_pipelines", str(config), "--set", f"run.output={output}", *more]
    for stage in moments:
        if killed(command, output, stage, rng):
            met += 1
            assert not wrong(output, whole)
        else:
            assert same(whole, output)
            shutil.rmtree(output)
    assert met >= len(moments) * 3 // 4
    assert main(command[3:]) == 0
    assert same(whole, output)
    assert not (output / "work").exists()


def test_run_killed_at_random_moments_ends_in_the_bytes_of_an_uninterrupted_one(small, tmp_path, monkeypatch):
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    whole = uninterrupted(config, tmp_path / "whole", monkeypatch)
    survives(config, tmp_path / "out", whole, ["read", "join", "write"], ["--workers", "2"])


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_run_killed_at_twenty_random_moments_ends_in_the_bytes_of_an_uninterrupted_one(workers, tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    many_tasks = ["--set", "run.task_mib=1", "--set", "shards.part_mib=1"]
    config = tmp_path / "recipe.toml"
    config.write_text(f"{DEMO.read_text()}\n".replace("[shards]\n", "[shards]\npart_mib = 1\n"))
    whole = uninterrupted(config, tmp_path / "whole", monkeypatch)
    moments = [STAGES[place * len(STAGES) // 20] for place in range(20)]
    survives(config, tmp_path / "out", whole, moments, [*many_tasks, "--workers", str(workers)])


@pytest.mark.slow
def test_run_on_ray_whose_command_is_killed_leaves_no_process_and_goes_on(small, tmp_path, monkeypatch):
    pytest.importorskip("ray")
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    whole = uninterrupted(config, tmp_path / "whole", monkeypatch)
    survives(config, tmp_path / "out", whole, ["read", "gather"], ["--executor", "ray", "--workers", "2"])
