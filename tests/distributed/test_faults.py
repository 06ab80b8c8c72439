"""Nothing is silent: what stops a run or skips an update is said in one clear line, the same on all ranks."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.launch import ROOT, environment, start, stop
from xlscale.checkpoint.store import MANIFEST, _digest, _seal, partition_file
from xlscale.data.shards import Corpus
from xlscale.training.metrics import read_events, read_metrics


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
    (line,) = refused(config, f"data.shards={shards}", f"data.cache={tmp_path / 'other'}").splitlines()
    assert str(shard) in line and "cut short" in line and str(len(content)) in line


def test_model_with_fewer_rows_than_the_tokenizer_has_ids_is_refused(config: Path) -> None:
    line = refused(config, "model.vocab_size=64").splitlines()[-1]
    assert line.startswith("xlscale: model.vocab_size=64 is less than the 500 ids")


def poison(folder: Path, parameter: str) -> None:
    """Put a NaN into one parameter of one data-parallel rank's partitions, and seal the checkpoint again."""
    path = folder / partition_file(0, 1)
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    tensors[f"fp32/{parameter}"][0] = torch.nan
    save_file(tensors, path, metadata=metadata)
    manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
    manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}
    manifest["seal"] = _seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(
    grid: dict[str, Path], tiny_config: ConfigFor, tmp_path: Path
) -> None:
    changes = shape_changes("dp2-tp1") | {"training.max_skipped_updates": 3}
    config = tiny_config(tmp_path, "poisoned", changes)
    run_dir = tmp_path / "poisoned"
    shutil.copytree(grid["dp2-tp1"] / "checkpoints" / "step-00000010", run_dir / "checkpoints" / "step-00000010")
    poison(run_dir / "checkpoints" / "step-00000010", "encoder.layers.0.mlp.up.weight")
    processes = start(2, ["-m", "xlscale.cli", "train", str(config)], tmp_path / "poisoned.log")
    try:
        assert [process.wait(120) for process in processes] == [2, 2]
    finally:
        stop(processes)
    output = (tmp_path / "poisoned.log.0").read_text()
    assert "Traceback" not in output
    assert "update 11 skipped: its gradient is not finite (slots 80 to 87)" in output
    assert "stopped after update 13: 3 updates in a row" in output
    records = read_metrics(run_dir)
    assert [r["skipped_updates"] for r in records] == [1, 2, 3]
    assert [r["loss"] for r in records] == [None] * 3
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "skip"] == [11, 12, 13]
