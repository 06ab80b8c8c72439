"""`xlscale deepspeed import` and `export`: what the engine saved, what its converter makes of it, and ours."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.engine_folders import CASES, MODEL, NAME, TAG, UPDATES, WORD, assert_same, copy, ours, rename
from xlscale.checkpoint import engine_grid
from xlscale.checkpoint.from_engine import import_engine
from xlscale.checkpoint.hub_names import hf_names
from xlscale.checkpoint.store import Checkpoint
from xlscale.checkpoint.to_universal import export_universal
from xlscale.cli import app
from xlscale.config import load_config
from xlscale.parallel.sharded import KINDS
from xlscale.training.loop import train
from xlscale.training.metrics import read_metrics


@pytest.mark.parametrize("case", CASES)
def test_what_the_engine_saved_becomes_our_checkpoint_of_that_moment_to_the_bit(
    case: str, engine_saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_grid, "MAPPED", 5000)  # so that files are mapped anew on the way
    stage, _, tp = CASES[case]
    made = import_engine(engine_saved / "engine" / case, engine_saved / "base.toml", tmp_path)
    assert made == tmp_path / NAME and Checkpoint.open(made).manifest["topology"]["dp"] == 4 // tp
    assert_same(made, ours(engine_saved, case))
    assert not Checkpoint.open(made).damaged(Checkpoint.open(made).manifest["files"])
    origin = Checkpoint.open(made).manifest["imported_from"]
    assert origin["topology"] == {"dp": 4 // tp, "tp": tp, "zero_stage": stage} and origin["step"] == UPDATES


@pytest.mark.parametrize("case", CASES)
def test_what_its_converter_makes_becomes_it_too(
    case: str, engine_saved: Path, engine_universal: Callable[[str], Path], tmp_path: Path
) -> None:
    made = import_engine(engine_universal(case), engine_saved / "base.toml", tmp_path, dp=3, tp=1)
    assert Checkpoint.open(made).manifest["topology"] == {"dp": 3, "tp": 1, "zero_stage": 3}
    assert_same(made, ours(engine_saved, case))
    assert_same(import_engine(engine_universal(case).parent, engine_saved / "base.toml", tmp_path / "again"), made)


@pytest.mark.parametrize("case", ["1-fp32", "3-bf16"])
def test_ours_in_the_universal_layout_is_the_converters_tensor_for_tensor(
    case: str, engine_saved: Path, engine_universal: Callable[[str], Path], tmp_path: Path
) -> None:
    found = export_universal(ours(engine_saved, case), tmp_path)
    assert (tmp_path / "latest_universal").read_text() == found.name
    wanted = engine_universal(case)
    names = {path.name for path in (found / "zero").iterdir()}
    # Below ZeRO-3 the converter adds the tied weight by its second name, and of it the first rank's slice.
    more = {path.name for path in (wanted / "zero").iterdir()} - names
    assert more == ({"head.decoder.weight"} if CASES[case][0] < 3 else set()) and WORD in names
    for name in names - {"optimizer_state.pt"}:
        for kind in KINDS:
            one, other = (torch.load(folder / "zero" / name / f"{kind}.pt") for folder in (found, wanted))
            assert one.keys() == other.keys(), name
            assert torch.equal(one.pop("param"), other.pop("param")), (kind, name)
            assert one == other, name
        if (wanted / "zero" / name / "step.pt").exists():
            assert torch.load(found / "zero" / name / "step.pt") == torch.load(wanted / "zero" / name / "step.pt")
    assert_same(import_engine(tmp_path, engine_saved / "base.toml", tmp_path / "back"), ours(engine_saved, case))


def test_a_run_goes_on_from_what_the_engine_saved_as_from_our_own(
    engine_saved: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    curves, weights = [], []
    for name in ("engines", "ours"):
        changes = shape_changes("dp1-tp1") | MODEL | {"training.stop_after": UPDATES + 2}
        config = tiny_config(tmp_path, name, changes | {"data.cache": str(engine_saved / "tokens")})
        checkpoints = tmp_path / name / "checkpoints"
        if name == "ours":
            shutil.copytree(ours(engine_saved, "3-fp32"), checkpoints / NAME)
        else:
            import_engine(engine_saved / "engine" / "3-fp32", config, checkpoints)
        train(load_config(config))
        curves.append([(r["step"], r["slot"], r["loss"], r["grad_norm"]) for r in read_metrics(tmp_path / name)])
        last = Checkpoint.open(checkpoints / f"step-{UPDATES + 2:08d}")
        weights.append([last.full(name, kind) for name in last.manifest["parameters"] for kind in KINDS])
    assert [step for step, *_ in curves[0]] == [UPDATES + 1, UPDATES + 2] and curves[0] == curves[1]
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_the_engine_loads_our_universal_layout_itself(engine_saved: Path) -> None:
    """Asserted where it is loaded: weights, moments and counts on every rank to the bit, then the same loss."""
    lines = (engine_saved / "launch.log.0").read_text().splitlines()
    assert [line for line in lines if " is loaded at tp " in line] == [
        "1-fp32 is loaded at tp 2",
        "2-fp32 is loaded at tp 2",
        "1-bf16 is loaded at tp 2",
        "3-fp32 is loaded at tp 1",
    ]
    # Of ZeRO-3 with tensor parallelism it takes the whole tensor for a slice; ours is resumed by xlscale itself.
    (line,) = [line for line in lines if "3-fp32 is not loaded at tp 2 for " in line]
    assert "exceeds dimension size" in line


@pytest.mark.parametrize("case", ["1-bf16", "3-fp32"])
def test_the_names_may_be_those_of_transformers(case: str, engine_saved: Path, tmp_path: Path) -> None:
    names = hf_names(load_config(engine_saved / "base.toml").model)
    names["head.decoder.bias"] = "lm_head.decoder.bias"  # lm_head.bias by its second name
    folder = copy(engine_saved, case, tmp_path)
    rename(folder, names)
    assert_same(import_engine(folder, engine_saved / "base.toml", tmp_path / "out"), ours(engine_saved, case))


def test_groups_that_decayed_otherwise_are_told(
    engine_saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import_engine(engine_saved / "engine" / "1-fp32", engine_saved / "base.toml", tmp_path / "same")
    assert " by [optimizer]" not in caplog.text
    changed = ["optimizer.weight_decay=0.02"]
    import_engine(engine_saved / "engine" / "3-fp32", engine_saved / "base.toml", tmp_path / "other", changed)
    assert "weight_decay was 0.01 there and is 0.02 by [optimizer], of " in caplog.text


def test_the_commands_say_where_it_is(engine_saved: Path, tmp_path: Path) -> None:
    source, config = str(engine_saved / "engine" / "1-fp32"), str(engine_saved / "base.toml")
    done = CliRunner().invoke(app, ["deepspeed", "import", source, config, "--out", str(tmp_path), "--tp", "1"])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == str(tmp_path / NAME), done.output
    there = tmp_path / "universal"
    done = CliRunner().invoke(app, ["deepspeed", "export", str(tmp_path / NAME), "--out", str(there), "--tp", "2"])
    assert done.exit_code == 0 and done.output.splitlines()[-1] == str(there / f"{TAG}_universal"), done.output
    bias = torch.load(there / f"{TAG}_universal" / "zero" / "head.decoder.bias" / "fp32.pt")["param"]
    assert len(bias) == 642 and not bias[641:].any()
