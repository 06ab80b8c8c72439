"""The commands a person types: under the launcher, without one, and twice on one run folder."""

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.launch import ROOT, environment
from tests.distributed.test_faults import refused
from xlscale.training.metrics import read_events, read_metrics


def finished(*command: str) -> str:
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_a_run_begun_by_the_launcher_goes_on_without_one(tiny_config: ConfigFor, tmp_path: Path) -> None:
    config = str(tiny_config(tmp_path, "run", shape_changes("dp2-tp1")))
    finished("launch/local.sh", "2", config, "--set", "training.stop_after=2")
    train = (sys.executable, "-m", "xlscale.cli", "train", config)
    said = finished(*train, "--set", "training.stop_after=3", "--set", "masking.mlm_probability=0.25")
    run_dir = tmp_path / "run"
    assert [(r["step"], r["dp"]) for r in read_metrics(run_dir)] == [(1, 2), (2, 2), (3, 1)]
    assert "goes on at update 3 of 20" in said
    # A changed setting is allowed, and said.
    assert "masking.mlm_probability was 0.15 and is 0.25" in said
    assert "masking.mlm_probability was 0.15 and is 0.25" in read_events(run_dir)[-4]["changed"]
    assert (run_dir / "checkpoints" / "latest").resolve().name == "step-00000003"
    assert (run_dir / "hub" / "step-00000003" / "model.safetensors").exists()
    assert {"config.toml", "deepspeed.json", "log.txt"} <= {path.name for path in run_dir.iterdir()}


def test_a_second_run_on_the_same_folder_is_refused(tiny_config: ConfigFor, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "run", shape_changes("dp1-tp1"))
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (line,) = refused(config).splitlines()
    assert f"run folder {tmp_path / 'run'} is in use by another run" in line and "run.name" in line
