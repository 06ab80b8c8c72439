"""xlscale/training/metrics.py: one unbroken curve per run; wandb never asks and never stops a run."""

import json
import logging
import os
import pty
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from xlscale.config import load_config
from xlscale.config_sections import Config
from xlscale.training.metrics import MetricsLog, log_line, read_events, read_metrics, short

REPO = Path(__file__).parents[1]
DEMO = REPO / "configs" / "demo.toml"


@pytest.fixture
def config() -> Config:
    return load_config(DEMO, ["logging.wandb=disabled"])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 9.0 - step / 10, "loss_per_language": {"de_DE": 8.0}, **more}


def write(run_dir: Path, config: Config, start: int, stop: int) -> None:
    metrics = MetricsLog(run_dir, config, start, is_main=True)
    metrics.event("resume" if start else "start", start)
    for step in range(start + 1, stop + 1):
        metrics.update(record(step))
    metrics.close()


def test_a_run_resumed_three_times_leaves_every_step_once(run_dir: Path, config: Config) -> None:
    for start, stop in ((0, 7), (5, 9), (5, 6), (6, 10)):
        write(run_dir, config, start, stop)
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(1, 11))
    assert [(e["event"], e["step"]) for e in read_events(run_dir)] == [
        ("start", 0),
        ("resume", 5),
        ("resume", 5),
        ("resume", 6),
    ]


def test_a_line_cut_short_by_a_kill_is_dropped_and_never_glued_to(
    run_dir: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    write(run_dir, config, 0, 3)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert [r["step"] for r in read_metrics(run_dir)] == [1, 2, 3]
    assert "1 last line was cut short" in caplog.text
    write(run_dir, config, 3, 5)
    assert [r["step"] for r in read_metrics(run_dir)] == [1, 2, 3, 4, 5]
    assert not list(run_dir.glob(".metrics*"))


def test_a_broken_line_in_the_middle_is_refused_by_its_number(run_dir: Path, config: Config) -> None:
    write(run_dir, config, 0, 1)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n" + json.dumps(record(3)) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(run_dir)


def test_records_that_were_lost_before_a_start_are_said(
    run_dir: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    write(run_dir, config, 0, 3)
    write(run_dir, config, 5, 6)
    assert "no records of steps 4 to 5" in caplog.text


def test_numbers_of_numpy_and_what_is_not_finite_become_plain_json(run_dir: Path, config: Config) -> None:
    metrics = MetricsLog(run_dir, config, 0, is_main=True)
    metrics.update(record(1, tokens=np.int64(7), grad_norm=float("inf"), share=np.float32(0.5)))
    metrics.close()
    (line,) = (run_dir / "metrics.jsonl").read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(line, parse_constant=refuse)
    assert (read["tokens"], read["grad_norm"], read["share"]) == (7, None, 0.5)


def test_a_process_that_is_not_the_main_one_writes_nothing(run_dir: Path, config: Config) -> None:
    metrics = MetricsLog(run_dir, config, 0, is_main=False)
    metrics.update(record(1))
    metrics.event("start", 0)
    metrics.close()
    assert not run_dir.exists()


def test_the_log_line_has_fixed_columns() -> None:
    full = {
        "step": 1200,
        "loss": 2.3142,
        "grad_norm": 0.812,
        "learning_rate": 1.2e-4,
        "tokens_per_second": 412_345,
        "mfu": 0.413,
        "loss_per_language": dict.fromkeys(map(str, range(14)), 1.0),
        "memory_gib": 61.2,
    }
    line = log_line(full)
    shown = "step 01200 loss 2.314 gnorm 0.81 lr 1.2e-04 tok/s 412k mfu 41.3% lang 14 mem 61.2GiB"
    assert " ".join(line.split()) == shown
    other = log_line({"step": 3, "loss": None, "tokens_per_second": 98.7, "mfu": None})
    assert "loss      -" in other
    assert [line.index(name) for name in ("loss", "mem")] == [other.index(name) for name in ("loss", "mem")]
    assert log_line({**full, "skipped_updates": 2}) == f"{line}  skipped 2"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.6, "1.00k"),
        (4123, "4.12k"),
        (98_760, "98.8k"),
        (412_345, "412k"),
        (2e6, "2.00M"),
    ],
)
def test_a_number_is_shortened_to_three_digits(number: float, text: str) -> None:
    assert short(number) == text


RUN = """
import logging, sys
from pathlib import Path
from xlscale.config import load_config
from xlscale.training import metrics as module
module.WANDB_INIT_SECONDS = 4.0
logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="LOG %(message)s")
demo, folder, mode, (start, stop) = sys.argv[1], Path(sys.argv[2]), sys.argv[3], map(int, sys.argv[4:])
config = load_config(demo, [f"logging.wandb={mode}"])
metrics = module.MetricsLog(folder / "run", config, start, is_main=True)
for step in range(start + 1, stop + 1):
    metrics.update({"step": step, "loss": 1.0 / step, "loss_per_language": {"de_DE": 2.0}})
metrics.close()
print("DONE")
"""


def start_run(
    folder: Path, mode: str, start: int = 0, stop: int = 3, terminal: bool = False, **env: str
) -> tuple[str, float]:
    """Runs three updates in a process of its own; returns all that it said and the seconds it took."""
    (folder / "home").mkdir(exist_ok=True)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    # Nothing listens on port 9 of loopback: a network that refuses.
    clean |= {
        "PYTHONPATH": str(REPO),
        "HOME": str(folder / "home"),
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        **env,
    }
    command = [sys.executable, "-c", RUN, str(DEMO), str(folder), mode, str(start), str(stop)]
    began = time.monotonic()
    if not terminal:
        done = subprocess.run(
            command,
            env=clean,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=150,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr, time.monotonic() - began
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, env=clean, cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    # A run that asks waits for an answer for ever.
    deadline = threading.Timer(60, process.kill)
    deadline.start()
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # the other side of the terminal is closed
        pass
    assert process.wait(timeout=150) == 0, said
    deadline.cancel()
    os.close(ours)
    return said.decode(), time.monotonic() - began


def test_wandb_offline_leaves_its_files_in_the_run_folder_and_says_nothing(tmp_path: Path) -> None:
    said, _ = start_run(tmp_path, "offline", 0, 3)
    assert said == "DONE\n"
    start_run(tmp_path, "offline", 2, 4)
    kept = (tmp_path / "run" / "wandb_run_id").read_text().strip()
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{kept}.wandb"))) >= 1
    assert {path.name.rpartition("-")[2] for path in (tmp_path / "run" / "wandb").glob("offline-run-*")} == {kept}
    assert [r["step"] for r in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert {path.name for path in tmp_path.iterdir()} == {"home", "run"}


def test_wandb_online_without_a_key_on_a_terminal_never_asks_and_says_so_once(tmp_path: Path) -> None:
    said, _ = start_run(tmp_path, "online", terminal=True)
    assert said.count("LOG wandb is not online") == said.count("LOG") == 1
    assert "DONE" in said and "account" not in said
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(read_metrics(tmp_path / "run")) == 3


def test_wandb_online_without_a_network_says_so_once_and_the_run_goes_on(tmp_path: Path) -> None:
    said, seconds = start_run(tmp_path, "online", WANDB_API_KEY="0" * 40)
    assert said.count("LOG wandb is not online") == said.count("LOG") == 1
    assert len(read_metrics(tmp_path / "run")) == 3
    assert seconds < 60


def test_the_environment_turns_wandb_off(tmp_path: Path) -> None:
    said, _ = start_run(tmp_path, "online", WANDB_MODE="disabled")
    assert said == "DONE\n"
    assert not (tmp_path / "run" / "wandb").exists()


def test_a_wandb_that_fails_in_mid_run_is_said_once(
    run_dir: Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        def log(self, *_: Any, **__: Any) -> None:
            raise OSError("the disk is full")

    metrics = MetricsLog(run_dir, config, 0, is_main=True)
    metrics._wandb._run = Broken()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3):
            metrics.update(record(step))
    metrics.close()
    assert caplog.text.count("wandb is off from here: its logging failed (the disk is full)") == 1
    assert len(read_metrics(run_dir)) == 3
