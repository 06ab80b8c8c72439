"""`xlscale deepspeed import`: what is not one whole checkpoint of the model asked for is refused by name."""

import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.engine_folders import (
    BATCH,
    NAME,
    NORM,
    TAG,
    UPDATES,
    WORD,
    assert_same,
    change,
    copy,
    flip,
    model,
    optim,
    ours,
    rename,
)
from tests.hub_folders import Bomb
from xlscale.checkpoint.from_engine import import_engine
from xlscale.checkpoint.store import Checkpoint
from xlscale.checkpoint.to_universal import export_universal


def fill(state: dict[str, Any], value: float) -> None:
    state["optimizer_state_dict"]["fp32_flat_groups"][0].detach()[3] = value


Change = Callable[[Path], object]
REFUSED: dict[str, tuple[str, Change, str]] = {
    "a file of more data-parallel ranks": (
        "3-fp32",
        lambda f: shutil.copy(f / optim(0, 0), f / optim(0, 2)),
        r"zero_pp_rank_2_mp_rank_00_optim_states\.pt is of no rank of dp 2 x tp 2, which zero_pp_rank_0_mp_rank_00_m",
    ),
    "files of more tensor-parallel ranks": (
        "1-fp32",
        lambda f: [shutil.copy(f / model(0), f / model(2)), shutil.copy(f / optim(0, 0), f / optim(2, 0))],
        r"mp_rank_02_optim_states\.pt \(and 1 more\) is of no rank of .*remove what that run left",
    ),
    "a file of the other stage": (
        "1-fp32",
        lambda f: shutil.copy(f / model(0), f / model(0, 0)),
        r"holds mp_rank_00_model_states\.pt of a lower stage and zero_pp_rank_0_mp_rank_00.* of ZeRO-3: two runs",
    ),
    "a file of the other precision": (
        "3-fp32",
        lambda f: shutil.copy(f / optim(0, 0), f / optim(0, 0, "bf16_")),
        r"holds both bf16_zero_pp_rank_0_mp_rank_00.* and zero_pp_rank_0_mp_rank_00.*: two runs wrote into it",
    ),
    "a rank's model states of another shape": (
        "3-fp32",
        lambda f: change(f / model(1, 1), lambda content: content.update(dp_world_size=4)),
        r"dp_world_size is 2 in .* and 4 in zero_pp_rank_1_mp_rank_01_model_states\.pt: they are not of one checkpoint",
    ),
    "a rank's optimizer of another shape": (
        "1-bf16",
        lambda f: change(
            f / optim(1, 1, "bf16_"), lambda content: content["optimizer_state_dict"].update(partition_count=[4, 4])
        ),
        r"bf16_zero_pp_rank_1_mp_rank_01_optim_states\.pt is of 4 data-parallel ranks, the model states of 2",
    ),
    "a rank's model states of another update": (
        "1-fp32",
        lambda f: change(f / model(1), lambda content: content.update(global_steps=7)),
        r"global_steps is 3 in .* and 7 in mp_rank_01_model_states\.pt: they are not of one checkpoint",
    ),
    "a rank's optimizer of another update": (
        "3-fp32",
        lambda f: change(
            f / optim(1, 1),
            lambda content: [
                each.update(step=7)
                for each in content["optimizer_state_dict"]["optimizer_state_dict"]["state"].values()
            ],
        ),
        r"the optimizer's step is 3 in .* and 7 in zero_pp_rank_1_mp_rank_01_optim_states\.pt",
    ),
    "a missing optimizer file": (
        "2-fp32",
        lambda f: (f / optim(1, 0)).unlink(),
        r"zero_pp_rank_0_mp_rank_01_optim_states\.pt is missing of dp 2 x tp 2, which mp_rank_00_model",
    ),
    "a missing file of model states": (
        "3-fp32",
        lambda f: (f / model(1, 1)).unlink(),
        r"zero_pp_rank_1_mp_rank_01_model_states\.pt is missing of dp 2 x tp 2",
    ),
    "no optimizer files": (
        "1-fp32",
        lambda f: [path.unlink() for path in f.glob("*_optim_states.pt")],
        r"has no \*_optim_states\.pt: it is of ZeRO stage 0, or a copy without them",
    ),
    "a cut file": (
        "1-fp32",
        lambda f: (f / optim(0, 1)).write_bytes((f / optim(0, 1)).read_bytes()[:5000]),
        r"zero_pp_rank_1_mp_rank_00_optim_states\.pt is cut, or not of torch\.save; copy it anew",
    ),
    "a flipped bit": (
        "3-fp32",
        lambda f: flip(f / optim(1, 1)),
        r"zero_pp_rank_1_mp_rank_01_optim_states\.pt is damaged \(.* in it has another checksum\); copy it anew",
    ),
    "a pipeline": (
        "1-fp32",
        lambda f: (f / "layer_01-model_00-model_states.pt").touch(),
        r"layer_01-model_00-model_states\.pt is of a pipeline, of experts, or of an optimizer on a disk",
    ),
    "unknown names": (
        "3-fp32",
        lambda f: rename(f, {NORM: "bert.norm.weight", WORD: "bert.word.weight"}),
        r"2 missing \(encoder\.embeddings\.word\.weight, encoder\.final_norm\.weight\); 2 unexpected \(bert\.norm",
    ),
    "a value that is not finite": (
        "3-fp32",
        lambda f: change(f / optim(0, 0), lambda content: fill(content, float("nan"))),
        r"fp32 of encoder\.\S+ holds nan; weights must be finite",
    ),
    "tensor-parallel ranks that drifted apart": (
        "2-fp32",
        lambda f: change(
            f / optim(1, 0),
            lambda content: content["optimizer_state_dict"]["single_partition_of_fp32_groups"][1].detach().add_(1),
        ),
        r"fp32 of encoder\.\S+ differs between tensor-parallel ranks 0 and 1, which hold it alike",
    ),
    "a file that holds something else": (
        "1-fp32",
        lambda f: torch.save({"optimizer_state_dict": {"single_partition_of_fp32_groups": [1, 2]}}, f / optim(0, 0)),
        r"zero_pp_rank_0_mp_rank_00_optim_states\.pt is not of ZeRO stage 1 or 2",
    ),
    "nonsense at the right place": (
        "1-fp32",
        lambda f: change(f / model(0), lambda content: content.update(param_shapes=[3, 4])),
        r"does not hold what the engine writes \(AttributeError: .*\); copy it anew",
    ),
}


def refused(work: Callable[[], object], out: Path) -> str:
    with pytest.raises(ValueError) as error:
        work()
    assert not list(out.glob("*")) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("what", REFUSED)
def test_files_that_are_not_one_whole_checkpoint_are_refused_by_name(
    what: str, engine_saved: Path, tmp_path: Path
) -> None:
    case, spoil, words = REFUSED[what]
    folder, out = copy(engine_saved, case, tmp_path), tmp_path / "out"
    spoil(folder)
    line = refused(lambda: import_engine(folder, engine_saved / "base.toml", out), out)
    assert re.search(words, line), line
    assert str(folder) in line


OTHER_MODELS = {
    "model.num_hidden_layers=3": r"16 missing \(encoder\.layers\.2\.",
    "model.num_hidden_layers=1": r"16 unexpected \(encoder\.layers\.1\.",
    "model.intermediate_size=32": r"of another shape \(encoder\.layers\.0\.mlp\.up\.weight \(66, 32\) for \(32, 32\)",
    "model.vocab_size=700": r"2 of another shape \(encoder\.embeddings\.word\.weight \(642, 32\) for \(700, 32\)",
    "model.vocab_size=640": r"word\.weight has 642 rows, and those past model\.vocab_size = 640 are not zero",
}


@pytest.mark.parametrize("override", OTHER_MODELS)
def test_another_model_is_refused_by_names_and_shapes(override: str, engine_saved: Path, tmp_path: Path) -> None:
    line = refused(
        lambda: import_engine(engine_saved / "engine" / "1-fp32", engine_saved / "base.toml", tmp_path, [override]),
        tmp_path,
    )
    assert re.search(OTHER_MODELS[override], line), line


def test_a_universal_folder_that_is_not_whole_is_refused_by_name(
    engine_saved: Path, engine_universal: Callable[[str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"

    def line(case: str, spoil: Change) -> str:
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(engine_universal(case), folder)
        spoil(folder)
        return refused(lambda: import_engine(folder, engine_saved / "base.toml", out), out)

    assert f"zero/{NORM}/fp32.pt is missing" in line("1-fp32", lambda f: (f / "zero" / NORM / "fp32.pt").unlink())
    assert f"zero/{NORM}/exp_avg.pt is missing" in line("1-fp32", lambda f: (f / "zero" / NORM / "exp_avg.pt").unlink())
    assert f"1 missing ({NORM})" in line("1-fp32", lambda f: shutil.rmtree(f / "zero" / NORM))
    assert "tells AdamW's step neither" in line("3-fp32", lambda f: (f / "zero" / "optimizer_state.pt").unlink())
    assert "has no *_model_states.pt" in line("1-fp32", lambda f: [p.unlink() for p in f.glob("*_states.pt")])
    assert f"zero/{WORD}/fp32.pt is damaged" in line("1-fp32", lambda f: flip(f / "zero" / WORD / "fp32.pt"))
    grid = engine_saved / "engine" / "1-fp32" / TAG / optim(0, 0)
    assert "holds both" in line("1-fp32", lambda f: shutil.copy(grid, f))


def test_a_file_that_asks_for_more_is_run_only_when_that_is_said(
    engine_saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a training script's client_state may: anything at all in the files of model states."""
    mark, out, folder = tmp_path / "it ran", tmp_path / "out", copy(engine_saved, "1-fp32", tmp_path)
    change(folder / model(1), lambda content: content.update(client=Bomb(f"'{mark}'")))
    line = refused(lambda: import_engine(folder, engine_saved / "base.toml", out), out)
    assert f"{folder / model(1)} is a pickle that asks for" in line and "it was not run" in line
    assert "--unsafe-pickle" in line and not mark.exists()
    made = import_engine(folder, engine_saved / "base.toml", out, unsafe=True)
    assert mark.exists() and f"{folder / model(1)} asks for" in caplog.text
    assert_same(made, ours(engine_saved, "1-fp32"))


def test_a_folder_without_a_way_to_its_tag_is_refused(engine_saved: Path, tmp_path: Path) -> None:
    def line(**files: str) -> str:
        folder = tmp_path / "source"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return refused(lambda: import_engine(folder, engine_saved / "base.toml", tmp_path / "out"), tmp_path / "out")

    assert "has no checkpoint of the engine and no file `latest`" in line()
    assert "names 'global_step9', no folder beside it" in line(latest="global_step9\n")
    assert "names '../source', no folder beside it" in line(latest="../source")
    assert "has latest ('a') and latest_universal ('b')" in line(latest="a", latest_universal="b")
    gone = tmp_path / "gone"
    assert f"{gone} is not a folder" in refused(lambda: import_engine(gone, engine_saved / "base.toml", gone), gone)


def test_where_it_goes_to_and_where_it_goes_on_are_checked(engine_saved: Path, tmp_path: Path) -> None:
    source, config, out = engine_saved / "engine" / "1-fp32", engine_saved / "base.toml", tmp_path / "out"
    line = refused(lambda: import_engine(source, config, out, slot=UPDATES * BATCH + 1), out)
    assert line.startswith(f"slot = {UPDATES * BATCH + 1} must be the first sample of an update") and "use 24" in line
    assert "must divide num_attention_heads" in refused(lambda: import_engine(source, config, out, tp=3), out)
    later = import_engine(source, config, out, slot=10 * BATCH)
    assert later.name == "step-00000010" and Checkpoint.open(later).state("stream")["slot"] == 10 * BATCH
    assert Checkpoint.open(later).manifest["optimizer_steps"] == UPDATES
    with pytest.raises(ValueError, match="is there, and a checkpoint is never written into"):
        import_engine(source, config, out, slot=10 * BATCH)
    exported = export_universal(later, tmp_path / "there")
    with pytest.raises(ValueError, match=f"{exported} is there, and a checkpoint is never written into"):
        export_universal(later, tmp_path / "there")


def test_a_disk_that_takes_no_more_leaves_nothing(engine_saved: Path, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        out = tmp_path / "out"
        source = engine_saved / "engine" / "1-fp32"
        line = refused(lambda: import_engine(source, engine_saved / "base.toml", out, dp=1, tp=1), out)
        assert f"{out / NAME} could not be written: " in line
        line = refused(lambda: export_universal(ours(engine_saved, "1-fp32"), out), out)
        assert f"{out / TAG}_universal could not be written: " in line
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
