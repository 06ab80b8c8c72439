"""A run that is killed, or moved to another shape, goes on as if nothing had been."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import STEPS, WORKER, ConfigFor, shape_changes
from tests.distributed.launch import run, start, stop
from xlscale.training.metrics import read_events, read_metrics

KILL_AFTER = 13


def curve(run_dir: Path) -> list[tuple[Any, ...]]:
    return [(r["step"], r["slot"], r["loss"], r["grad_norm"], r["tokens_per_language"]) for r in read_metrics(run_dir)]


def test_killed_run_goes_on_from_its_checkpoint_to_the_bit(
    grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path
) -> None:
    """With two loader processes for each rank before, and none after: they are no part of the state."""
    config = tiny_config(tmp_path, "killed", shape_changes("dp2-tp1") | {"data.workers": 2, "data.prefetch": 4})
    run_dir = tmp_path / "killed"
    processes = start(2, [WORKER, str(config)], tmp_path / "first.log")
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or len(read_metrics(run_dir)) < KILL_AFTER:
            assert time.monotonic() < deadline, (tmp_path / "first.log.0").read_text()
            assert all(process.poll() is None for process in processes), "it ended before it could be killed"
            time.sleep(0.01)
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        stop(processes)
    # What the killed run had begun to write must not confuse the next start.
    (run_dir / "checkpoints" / "step-00000015.partial").mkdir()

    config = tiny_config(tmp_path, "killed", shape_changes("dp2-tp1"))
    run(2, [WORKER, str(config)], tmp_path / "second.log", timeout=120)

    assert curve(run_dir) == curve(grid["dp2-tp1"])
    resumed = [event for event in read_events(run_dir) if event["event"] == "resume"]
    assert [event["step"] for event in resumed] == [10]
    assert "goes on at update 11 of 20" in (run_dir / "log.txt").read_text()
    assert not list((run_dir / "checkpoints").glob("*.partial"))


def test_loader_processes_change_no_loss(grid: dict[str, Path]) -> None:
    assert curve(grid["dp2-tp1-loader"]) == curve(grid["dp2-tp1"])


@pytest.mark.parametrize("shape", ["dp1-tp1", "dp1-tp2"])
def test_resume_at_another_shape_repeats_no_sample_and_keeps_the_losses(
    shape: str, grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path
) -> None:
    config = tiny_config(tmp_path, "moved", shape_changes(shape))
    moved, origin = tmp_path / "moved", grid["dp2-tp2"]
    shutil.copytree(origin / "checkpoints" / "step-00000010", moved / "checkpoints" / "step-00000010")
    lines = (origin / "metrics.jsonl").read_text().splitlines(keepends=True)
    (moved / "metrics.jsonl").write_text("".join(lines[:10]))

    run(2 if shape == "dp1-tp2" else 1, [WORKER, str(config)], tmp_path / "moved.log", timeout=120)

    walked, stayed = read_metrics(moved), read_metrics(origin)
    assert [r["step"] for r in walked] == list(range(1, STEPS + 1))
    assert [r["tokens_per_language"] for r in walked] == [r["tokens_per_language"] for r in stayed]
    assert [r["loss"] for r in walked] == pytest.approx([r["loss"] for r in stayed], rel=1e-5)
    assert [r["grad_norm"] for r in walked] == pytest.approx([r["grad_norm"] for r in stayed], rel=1e-4)
    assert "the probe's logits are those of the checkpoint, to " in (moved / "log.txt").read_text()


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        content = content[: len(content) // 2]
    else:
        content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["cut", "flipped"])
@pytest.mark.parametrize("file", ["manifest.json", "partitions-tp00-dp0001.safetensors", "stream.json"])
def test_damaged_checkpoint_is_passed_over_by_name(
    file: str, how: str, grid: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from xlscale.checkpoint.newest import newest

    root = tmp_path / "checkpoints"
    shutil.copytree(grid["dp2-tp2"] / "checkpoints", root, symlinks=True)
    damage(root / f"step-{STEPS:08d}" / file, how)
    with caplog.at_level("WARNING", logger="xlscale"):
        found = newest(root)
    assert found is not None and found.step == 10
    assert f"step-{STEPS:08d}" in caplog.text and file in caplog.text


def test_checkpoint_of_another_model_is_refused(grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path) -> None:
    from xlscale.config import load_config
    from xlscale.training.loop import train

    config = tiny_config(tmp_path, "other", shape_changes("dp1-tp1") | {"model.intermediate_size": 128})
    shutil.copytree(grid["dp1-tp1"] / "checkpoints" / "step-00000010", tmp_path / "other/checkpoints/step-00000010")
    with pytest.raises(ValueError, match=r"mlp.*32.*64.*128|mlp.*\(64.*\(128"):
        train(load_config(config))


def test_changed_stream_is_refused_unless_allowed_and_then_kept_in_every_checkpoint(
    grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path
) -> None:
    from xlscale.config import load_config
    from xlscale.training.loop import train

    config = tiny_config(tmp_path, "changed", shape_changes("dp1-tp1") | {"data.sampling_alpha": 0.7})
    run_dir = tmp_path / "changed"
    shutil.copytree(grid["dp1-tp1"] / "checkpoints" / "step-00000010", run_dir / "checkpoints" / "step-00000010")
    with pytest.raises(ValueError, match=r"^sampling was .* allow it: data\.allow_changes = \['sampling'\]$"):
        train(load_config(config))

    def go_on(stop: int) -> list[dict[str, Any]]:
        train(load_config(config, ["data.allow_changes=['sampling', 'corpus']", f"training.stop_after={stop}"]))
        kept = json.loads((run_dir / "checkpoints" / f"step-000000{stop}" / "stream.json").read_text())
        return list(kept["changes"])

    first = go_on(11)
    (event,) = [event for event in read_events(run_dir) if event["event"] == "stream_changed"]
    assert first == [{"step": 10, "changes": event["changes"]}]
    assert event["step"] == 10 and event["changes"][0].startswith("sampling was ")
    # The checkpoint is the changed stream's by now: nothing more to allow, and nothing forgotten.
    assert go_on(12) == first
    assert sum(event["event"] == "stream_changed" for event in read_events(run_dir)) == 1


def test_manifest_names_every_parameter_with_its_full_shape(grid: dict[str, Path]) -> None:
    manifests = [
        json.loads((grid[name] / "checkpoints" / "step-00000010" / "manifest.json").read_text())["parameters"]
        for name in ("dp1-tp1", "dp2-tp2")
    ]
    assert manifests[0] == manifests[1]
