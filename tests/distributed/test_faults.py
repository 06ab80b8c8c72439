"""Nothing is silent: what stops a run or skips an update is said in one clear line, the same on all ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.fault_cases import (
    BATCH,
    LAST,
    MATRIX,
    NORM,
    START,
    WINDOW,
    lonely_label,
    sparse_label,
    spike,
)
from tests.distributed.launch import ROOT, environment, start, stop
from tests.distributed.test_resume import curve
from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.store import MANIFEST
from xlscale.config import ConfigError, load_config
from xlscale.data.shards import Corpus
from xlscale.data.stream import open_stream
from xlscale.training.faulty_update import read_faulty_update
from xlscale.training.loop import train
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.replay import replay


def refused(config: Path, *sets: str) -> str:
    """Stderr of a run that a person must mend: exit status 2 and no traceback."""
    arguments = [word for change in sets for word in ("--set", change)]
    done = subprocess.run(
        [sys.executable, "-m", "xlscale.cli", "train", str(config), *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.fixture
def config(tiny_config: ConfigFor, tmp_path: Path) -> Path:
    return tiny_config(tmp_path, "faulty", shape_changes("dp1-tp1"))


def test_misspelt_key_tensor_parallel_size_and_missing_tokenizer_are_one_line_each(
    config: Path, tmp_path: Path
) -> None:
    lines = refused(config, "training.total_step=5", "parallel.tensor_parallel=3").splitlines()
    assert len(lines) == 2
    assert "training.total_step;" in lines[0] and "did you mean training.total_steps?" in lines[0]
    assert "parallel.tensor_parallel = 3 must divide num_attention_heads = 4" in lines[1] and "use one of" in lines[1]

    (line,) = refused(config, f"data.tokenizer={tmp_path / 'nowhere'}").splitlines()
    assert str(tmp_path / "nowhere") in line and "no tokenizer there" in line and "data.tokenizer" in line


def test_tensor_parallel_size_that_does_not_divide_the_processes_is_refused(config: Path) -> None:
    (line,) = refused(config, "parallel.tensor_parallel=2").splitlines()
    assert "parallel.tensor_parallel = 2 must divide the number of processes, 1" in line and "use one of" in line


def test_shard_cut_short_is_named(config: Path, tiny_corpus: Corpus, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_corpus.folder, shards)
    shard = sorted(shards.glob("*/*.tar"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    said = refused(config, f"data.shards={shards}", f"data.cache={tmp_path / 'other'}").splitlines()
    named, way_out = (line for line in said if line.startswith("xlscale: "))
    assert f"{shard.parent.name}/{shard.name}: " in named and named.endswith(" documents: cut short")
    assert "documents cannot be used so far, faults.max_bad_documents = 0 allows fewer; mend or bring back" in way_out


def test_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(config: Path) -> None:
    line = refused(config, "model.vocab_size=64").splitlines()[-1]
    assert line.startswith("xlscale: model.vocab_size=64 is less than the 500 ids")


def skips(run_dir: Path) -> list[dict[str, Any]]:
    return [event for event in read_events(run_dir) if event["event"] == "skip"]


def state(folder: Path) -> dict[str, bytes]:
    """The bytes of every weight and moment of every rank."""
    found = {}
    for path in sorted(folder.glob("partitions-*")):
        with safe_open(str(path), framework="pt") as file:
            found |= {f"{path.name} {key}": file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    assert found
    return found


def checkpoint(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def assert_only_skipped(run_dir: Path, update: int, reason: str) -> None:
    """Of all updates one was skipped, on all ranks, and nothing of the model moved in it."""
    (event,) = skips(run_dir)
    assert (event["step"], event["reason"]) == (update, reason)
    assert event["slots"] == [(update - 1) * BATCH, update * BATCH - 1]
    assert sum(event["languages"].values()) == BATCH
    records = {record["step"]: record for record in read_metrics(run_dir)}
    assert [record["skipped_updates"] for record in records.values()] == [int(step >= update) for step in records]
    before, skipped = checkpoint(run_dir, update - 1), checkpoint(run_dir, update)
    assert state(skipped) == state(before)
    steps = [json.loads((folder / MANIFEST).read_text())["optimizer_steps"] for folder in (before, skipped)]
    assert steps[0] == steps[1]
    if update + 1 in records:
        after = checkpoint(run_dir, update + 1)
        assert state(after) != state(skipped) and records[update + 1]["grad_norm"] is not None
        assert json.loads((after / MANIFEST).read_text())["optimizer_steps"] == steps[1] + 1
    told = ", ".join(f"{code} {count}" for code, count in event["languages"].items())
    line = f"update {update} skipped: {reason} (slots {event['slots'][0]} to {event['slots'][1]}: {told})"
    assert line in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("name", ["nan", "nan-tp"])
def test_nan_of_one_rank_skips_on_all_until_the_budget_stops_the_run_with_a_checkpoint(name: str, runs: Path) -> None:
    run_dir = runs / name
    assert [(event["step"], event["reason"]) for event in skips(run_dir)] == [(n, "loss is nan") for n in (5, 6, 7)]
    before = state(checkpoint(run_dir, START))
    if name == "nan":  # written at the same shape
        assert state(checkpoint(run_dir, 7)) == before
    assert state(checkpoint(run_dir, 7)) == state(checkpoint(run_dir, 5))
    lines = {(runs / f"{name}.stopped.{rank}").read_text() for rank in range(4 if name == "nan-tp" else 2)}
    assert lines == {
        "stopped after update 7: 3 of the last 7 updates were skipped as faulty, faults.max_skipped = 3; raise it, or "
        "lower optimizer.learning_rate; `xlscale replay` shows what was wrong with a batch"
    }
    records = read_metrics(run_dir)
    assert [(r["loss"], r["grad_norm"], r["skipped_updates"]) for r in records] == [(None, None, n) for n in (1, 2, 3)]
    assert [r["slot"] for r in records] == [40, 48, 56]
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(runs / "plain")}
    assert [r["learning_rate"] for r in records] == [rates[n] for n in (5, 6, 7)]
    assert read_events(run_dir)[-1]["event"] == "stop"


@pytest.mark.parametrize("name", ["inf", "inf-bf16", "inf-tp"])
def test_infinite_loss_of_one_rank_with_finite_gradients_skips_on_all(name: str, runs: Path) -> None:
    assert_only_skipped(runs / name, lonely_label(runs)[0], "loss is inf")
    assert read_metrics(runs / name)[-1]["step"] == LAST


def test_last_micro_step_without_masked_tokens_skips_as_well(runs: Path) -> None:
    update, _ = sparse_label(runs)
    assert_only_skipped(runs / "empty", update, "loss is inf")


def test_update_without_any_masked_token_is_no_fault(runs: Path) -> None:
    records = read_metrics(runs / "nothing")
    assert [(r["loss"], r["masked_tokens"], r["skipped_updates"]) for r in records] == [(None, 0, 0)] * 2


def test_spike_is_found_exactly_above_the_threshold(runs: Path) -> None:
    update, _ = spike(runs)
    assert not skips(runs / "no-spike")
    losses = [record["loss"] for record in read_metrics(runs / "spike")]
    assert losses[:update] == [record["loss"] for record in read_metrics(runs / "plain")][:update]
    ratio = losses[update - 1] / (sum(losses[update - 1 - WINDOW : update - 1]) / WINDOW)
    reason = f"loss {losses[update - 1]:.2f} is {ratio:.1f} times the mean of the last {WINDOW}"
    assert_only_skipped(runs / "spike", update, reason)


@pytest.mark.parametrize(("straight", "resumed"), [("spike", "spike-resumed"), ("inf", "inf-resumed")])
def test_run_resumed_around_a_skip_goes_on_to_the_bit(straight: str, resumed: str, runs: Path) -> None:
    assert sum(event["event"] in ("start", "resume") for event in read_events(runs / resumed)) > 1
    assert curve(runs / resumed) == curve(runs / straight)
    last = read_metrics(runs / straight)[-1]["step"]
    assert state(checkpoint(runs / resumed, last)) == state(checkpoint(runs / straight, last))
    kept = [json.loads((checkpoint(runs / name, last) / "faults.json").read_text()) for name in (straight, resumed)]
    assert kept[0] == kept[1] and len(kept[0]["skipped"]) == 1 and len(kept[0]["losses"]) == WINDOW


@pytest.mark.parametrize("name", ["drift-3", "drift-4"])
def test_drifted_run_is_stopped_and_never_saved(name: str, runs: Path) -> None:
    """The LayerNorm drifts in update 3; it is looked for after update 3, or only before the checkpoint of update 4."""
    lines = {(runs / f"{name}.stopped.{rank}").read_text() for rank in range(2)}
    assert lines == {
        f"stopped after update {name[-1]}: {NORM} must be alike on all tensor-parallel ranks and is not any more; "
        f"start it again, it goes on from the newest of {runs / name / 'checkpoints'}, and report it"
    }
    assert [path.name for path in (runs / name / "checkpoints").glob("step-*")] == ["step-00000002"]


def test_files_of_skipped_updates_hold_what_the_stream_gives(runs: Path) -> None:
    files = sorted((runs / "nan" / "faults").iterdir())
    # Three were skipped, faults.keep = 2.
    assert [file.name for file in files] == ["update-00000006.safetensors", "update-00000007.safetensors"]
    stream = open_stream(load_config(runs / "nan" / "config.toml"))
    for file, event in zip(files, skips(runs / "nan")[1:], strict=True):
        faulty = read_faulty_update(file)
        batch = stream.batch(range((faulty.step - 1) * BATCH, faulty.step * BATCH))
        mask = np.ones_like(batch.input_ids, bool) if batch.attention_mask is None else batch.attention_mask
        np.testing.assert_array_equal(faulty.batch.attention_mask, mask)
        for name in ("input_ids", "labels", "languages", "slots"):
            np.testing.assert_array_equal(getattr(faulty.batch, name), getattr(batch, name))
        assert (faulty.step, faulty.reason, faulty.seed, faulty.codes) == (
            event["step"],
            "loss is nan",
            7,
            stream.languages,
        )
        assert faulty.learning_rate == read_metrics(runs / "nan")[faulty.step - START - 1]["learning_rate"]
        assert faulty.versions.keys() >= {"torch", "deepspeed", "xlscale"}
        assert event["batches"] == str(runs / "nan" / "faults" / f"update-{event['step']:08d}.safetensors")


@pytest.mark.parametrize("shape", ["dp2", "tp2"])
def test_replay_gives_the_runs_loss_and_gradient_norm_with_its_dropout(shape: str, runs: Path) -> None:
    """The spike is finite: where the rule did not hold, the same update has a gradient norm in the metrics."""
    update, _ = spike(runs)
    expected = read_metrics(runs / "plain")[update - 1]
    lines = (runs / f"spike:{shape}.replayed").read_text().splitlines()
    assert lines[0].startswith(f"update {update} of {runs / 'spike'} was skipped: loss ")
    assert lines[1].startswith(f"weights: after update {update}, of ") and lines[1].endswith(
        "those that the update had"
    )
    table = [line.split() for line in lines[3:7]]
    first = (update - 1) * BATCH
    assert [row[0] for row in table] == [f"{first + 2 * n}-{first + 2 * n + 1}" for n in range(4)]
    assert [row[2] for row in table] == ["yes"] * 4
    loss, norm = (float(word.split()[-1]) for word in lines[7].split(","))
    assert lines[7].startswith("update: loss ") and loss == pytest.approx(expected["loss"], rel=1e-5)
    assert norm == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert [line.split(":")[1].split()[0] for line in lines[8:]] == ["0", "0"]


def test_replay_at_another_shape_names_the_poisoned_parameter(runs: Path) -> None:
    lines = (runs / "nan:tp2.replayed").read_text().splitlines()
    assert lines[0].startswith(f"update 7 of {runs / 'nan'} was skipped: loss is nan")
    assert [line.split()[2] for line in lines[3:7]] == ["NO"] * 4
    assert lines[7] == "update: loss nan, gradient norm nan"
    weights = lines.index(f"  {MATRIX}")
    assert lines[weights - 1].startswith("weights not finite: 1 of ")
    assert lines[weights + 1].startswith("gradients not finite: ")


def test_replay_command_says_how_far_before_the_fault_the_weights_are(runs: Path, tmp_path: Path) -> None:
    """One process; -inf in a bias: only the micro-batch with that label has no finite loss, the gradient is finite."""
    update, _ = lonely_label(runs)
    shutil.copytree(runs / "inf", tmp_path / "inf")
    for step in range(update - 1, LAST + 1):
        shutil.rmtree(checkpoint(tmp_path / "inf", step))
    before = sorted(tmp_path.rglob("*"))
    file = tmp_path / "inf" / "faults" / f"update-{update:08d}.safetensors"
    out = finished_replay(str(file))
    assert f"weights: after update {update - 2}, of " in out and ": 1 update before those that the update had" in out
    assert "update: loss inf, gradient norm " in out and "gradients not finite: 0 of " in out
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    # Where only later checkpoints are left there is nothing to go by.
    shutil.rmtree(tmp_path / "inf" / "checkpoints")
    shutil.copytree(checkpoint(runs / "inf", LAST), checkpoint(tmp_path / "inf", LAST))
    with pytest.raises(ConfigError, match=f"no whole checkpoint at or before update {update}, the newest is step-"):
        replay(file, [])
    shutil.rmtree(tmp_path / "inf" / "checkpoints")
    told = f"weights: the first ones, before any update: {update - 1} updates before those that the update had"
    assert told in replay(file, ["training.micro_batch_size=4"])


def finished_replay(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "xlscale.cli", "replay", *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_budget_outlives_a_kill_and_a_changed_config_goes_on(
    runs: Path, tmp_path: Path, tiny_config: ConfigFor
) -> None:
    changes = shape_changes("dp2-tp1") | {"checkpoint.every": 2, "faults.max_skipped": 6, "parallel.self_check": False}
    config = tiny_config(tmp_path, "killed", changes)
    run_dir = tmp_path / "killed"
    shutil.copytree(checkpoint(runs / "nan", START), checkpoint(run_dir, START))
    command = ["-m", "xlscale.cli", "train", str(config)]
    processes = start(2, [*command, "--set", "faults.max_skipped=1000"], tmp_path / "first.log")
    try:
        deadline = time.monotonic() + 120
        while not checkpoint(run_dir, 8).exists():
            assert time.monotonic() < deadline, (tmp_path / "first.log.0").read_text()
            time.sleep(0.01)
        for process in processes:
            os.killpg(process.pid, signal.SIGKILL)
    finally:
        stop(processes)
    done = newest(run_dir / "checkpoints")
    assert done is not None
    for step in range(9, 20):  # as if the kill had come before them
        shutil.rmtree(checkpoint(run_dir, step), ignore_errors=True)

    processes = start(2, command, tmp_path / "second.log")
    try:
        assert [process.wait(120) for process in processes] == [2, 2]
    finally:
        stop(processes)
    lines = (tmp_path / "second.log.0").read_text().splitlines()
    assert lines[-1].startswith("xlscale: stopped after update 10: 6 of the last 10 updates were skipped as faulty")
    assert not any("Traceback" in (tmp_path / f"second.log.{rank}").read_text() for rank in range(2))
    assert [record["skipped_updates"] for record in read_metrics(run_dir)][-2:] == [5, 6]

    def restart(*overrides: str) -> None:
        one = ["training.micro_batch_size=8", "training.stop_after=12", *overrides]
        train(load_config(config, one))

    with pytest.raises(ConfigError, match=r"step-00000010: 6 of the last 10 .* and nothing was changed since; raise"):
        train(load_config(config, ["faults.max_skipped=5"]))
    with pytest.raises(ConfigError, match="stopped after update 11: 7 of the last 11"):
        restart("faults.max_skipped=7")
    with pytest.raises(ConfigError, match="stopped after update 12: 1 of the last 1 "):
        restart("optimizer.learning_rate=1e-4", "faults.max_skipped=1")
    assert [record["skipped_updates"] for record in read_metrics(run_dir)][-2:] == [7, 8]
