"""xlscale/cli.py: one clear line and exit status 2 for what a person can mend, a trace for our own faults."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from xlscale import __version__
from xlscale.cli import _is_for_people
from xlscale.config import load_config

REPO = Path(__file__).parents[1]


def xlscale(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "xlscale.cli", *arguments],
        cwd=REPO,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def refused(*arguments: str, **env: str) -> list[str]:
    done = xlscale(*arguments, **env)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.stderr.splitlines()


def test_help_says_what_each_command_does() -> None:
    text = xlscale("--help").stdout
    for name in ("train", "replay", "export", "reshard", "import", "extend", "report", "deepspeed"):
        (line,) = [line for line in text.splitlines() if line.strip().startswith(name)]
        assert len(line.split()) > 3
        assert xlscale(name, "--help").returncode == 0
    assert "local_rank" not in text + xlscale("train", "--help").stdout


def test_the_version_is_the_packages() -> None:
    assert xlscale("--version").stdout == f"xlscale {__version__}\n"


def test_all_problems_of_a_config_are_one_line_each() -> None:
    lines = refused(
        "train", "configs/demo.toml", "--set", "training.total_step=5", "--set", "parallel.tensor_parallel=3"
    )
    assert len(lines) == 2
    assert all(line.startswith("xlscale: --set ") for line in lines)
    assert "did you mean training.total_steps?" in lines[0]
    assert "must divide num_attention_heads" in lines[1] and "use one of [1, 2, 4]" in lines[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("train", "configs/dmeo.toml"),
            "config file configs/dmeo.toml does not exist; there are configs/demo.toml",
        ),
        (("report", "runs/nowhere"), "runs/nowhere"),
        (("replay", "runs/nowhere/update-00000001.safetensors"), "does not exist; skipped updates are kept in"),
        (("export", "runs/nowhere", "--out", "runs/nowhere/hub"), "runs/nowhere"),
        (("reshard", "runs/nowhere", "--dp", "2", "--tp", "1", "--out", "runs/nowhere"), "runs/nowhere"),
    ],
)
def test_a_path_that_does_not_exist_is_one_line(arguments: tuple[str, ...], expected: str) -> None:
    (line,) = refused(*arguments)
    assert line.startswith("xlscale: ") and expected in line


@pytest.mark.parametrize(
    "arguments", [("train",), ("train", "configs/demo.toml", "--nope"), ("export", "x"), ("tarin",)]
)
def test_wrong_arguments_are_refused(arguments: tuple[str, ...]) -> None:
    assert any("Error:" in line for line in refused(*arguments))


def test_the_launchers_local_rank_is_taken_and_must_agree() -> None:
    bad = ("train", "configs/demo.toml", "--set", "training.seed=-1")
    (line,) = refused("--local_rank=0", *bad, LOCAL_RANK="0", RANK="0")
    assert "training.seed = -1 is too small" in line
    (line,) = refused("--local_rank=1", *bad, LOCAL_RANK="0", RANK="0")
    assert "--local_rank=1 must equal the environment's LOCAL_RANK=0" in line


def test_of_all_processes_one_says_what_is_wrong_with_the_config() -> None:
    bad = ("train", "configs/demo.toml", "--set", "training.seed=-1")
    assert refused("--local_rank=1", *bad, LOCAL_RANK="1", RANK="1") == []


def test_a_mistake_of_a_library_keeps_its_trace(tmp_path: Path) -> None:
    import numpy as np

    with pytest.raises(ValueError) as theirs:
        np.array([1.0, 2.0]).reshape(3).sum()
    with pytest.raises(FileNotFoundError) as ours:
        load_config(tmp_path / "none.toml")
    with pytest.raises(ValueError) as deep:
        np.cross([1.0], [2.0])
    assert _is_for_people(ours.value)
    assert not _is_for_people(deep.value)
    assert not _is_for_people(theirs.value)  # the innermost frame is this test's


def test_the_launcher_starts_the_processes_and_gives_their_status(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "launch/local.sh", "2", "configs/demo.toml", "--set", "training.seed=-1"],
        cwd=REPO,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert done.stderr.count("training.seed = -1 is too small; use 0 or more") == 1
    wrong = subprocess.run(["bash", "launch/local.sh", "none"], cwd=REPO, capture_output=True, text=True)
    assert wrong.returncode == 2 and "usage: launch/local.sh NPROC CONFIG" in wrong.stderr
