"""`xlscale reshard`: the same checkpoint for another shape, to the bit, or a refusal that leaves nothing behind."""

import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.distributed.conftest import ConfigFor, shape_changes
from xlscale.checkpoint import reshard as resharding
from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.partition_file import partition_file
from xlscale.checkpoint.reshard import reshard
from xlscale.checkpoint.store import Checkpoint
from xlscale.cli import app
from xlscale.config import load_config
from xlscale.parallel.sharded import KINDS
from xlscale.training.loop import train
from xlscale.training.metrics import read_metrics

STEPS = 3
NAME = f"step-{STEPS:08d}"


@pytest.fixture(scope="module")
def origin(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of three updates on one process, with a vocabulary that no number of ranks divides."""
    folder = tmp_path_factory.mktemp("reshard")
    changes = shape_changes("dp1-tp1") | {"model.vocab_size": 641, "training.stop_after": STEPS}
    train(load_config(tiny_config(folder, "origin", changes)))
    return folder / "origin"


@pytest.mark.parametrize("block", [resharding.BLOCK, 1000])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 2), (7, 1), (1, 4), (3, 2)])
def test_every_weight_and_moment_is_the_same_to_the_bit_there_and_back(
    dp: int, tp: int, block: int, origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharding, "BLOCK", block)
    there = reshard(origin, tmp_path / "there", dp, tp)
    before, after = Checkpoint.open(origin / "checkpoints" / NAME), newest(tmp_path / "there")
    assert there.name == NAME and after is not None and after.folder.name == NAME
    assert after.manifest["topology"] == {"dp": dp, "tp": tp, "zero_stage": 3}
    assert len(list(there.glob("partitions-*"))) == dp * tp
    for name in before.manifest["parameters"]:
        for kind in KINDS:
            assert torch.equal(after.full(name, kind), before.full(name, kind)), (kind, name)
    for key in ("step", "slot", "optimizer_steps", "parameters", "format"):
        assert after.manifest[key] == before.manifest[key]
    for name in ("stream", "faults", "data_faults"):
        assert after.state(name) == before.state(name)
    assert torch.equal(after.state("probe")["logits"], before.state("probe")["logits"])
    back, once = reshard(there, tmp_path / "back", 1, 1), reshard(origin, tmp_path / "once", 1, 1)
    assert (back / partition_file(0, 0)).read_bytes() == (once / partition_file(0, 0)).read_bytes()


def test_a_run_goes_on_from_it_as_from_the_one_it_was_made_of(
    origin: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    curves, weights = [], []
    for run, source in (("cut", reshard(origin, tmp_path / "other", 2, 2)), ("whole", origin / "checkpoints" / NAME)):
        shutil.copytree(source, tmp_path / run / "checkpoints" / NAME)
        changes = shape_changes("dp1-tp1") | {"model.vocab_size": 641, "training.stop_after": STEPS + 2}
        train(load_config(tiny_config(tmp_path, run, changes)))
        curves.append([(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / run)])
        found = newest(tmp_path / run / "checkpoints")
        assert found is not None and found.step == STEPS + 2
        weights.append([found.full(name, kind) for name in found.manifest["parameters"] for kind in KINDS])
    assert curves[0] == curves[1] and len(curves[0]) == 2
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_the_command_says_where_it_is(origin: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["reshard", str(origin), "--dp", "2", "--tp", "2", "--out", str(tmp_path)])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == str(tmp_path / NAME)
    assert Checkpoint.open(tmp_path / NAME).manifest["resharded_from"]["topology"]["dp"] == 1


def refused(work: Callable[[], object], out: Path) -> str:
    with pytest.raises(ValueError) as error:
        work()
    assert not list(out.glob("*.partial"))
    return str(error.value)


def test_what_cannot_be_done_is_refused_and_leaves_nothing(origin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = refused(lambda: reshard(origin, out, 1, 3), out)
    assert "parallel.tensor_parallel = 3 must divide num_attention_heads = 4" in line
    assert "dp = 0 is too small" in refused(lambda: reshard(origin, out, 0, 1), out)
    there = reshard(origin, out, 2, 1)
    line = refused(lambda: reshard(origin, out, 1, 1), out)
    assert line == f"{there} is there, and a checkpoint is never written into; name another folder"
    line = refused(lambda: reshard(origin, origin / "checkpoints", 1, 2), origin / "checkpoints")
    assert "is there, and a checkpoint is never written into" in line
    path = there / partition_file(0, 1)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert f"{path}: damaged" in refused(lambda: reshard(there, tmp_path / "next", 1, 1), tmp_path / "next")


def test_a_file_that_cannot_be_written_whole_leaves_nothing(origin: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1]))
    try:
        line = refused(lambda: reshard(origin, out, 1, 2), out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{out / NAME} could not be written: " in line and not list(out.iterdir())


def test_a_disk_without_room_is_refused_before_anything_is_copied(
    origin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resharding.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 5, 5))
    line = refused(lambda: reshard(origin, tmp_path / "out", 1, 2), tmp_path / "out")
    assert "needs 0.0 GiB and the disk has 0.0; make room" in line
