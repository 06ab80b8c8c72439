"""The self-check lets sound parallelism pass and names what is broken; a drifted parameter is named by its digest."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import WORKER, ConfigFor, shape_changes
from tests.distributed.launch import ROOT, run, start, stop
from tests.distributed.self_check_cases import BROKEN, NUDGED, SOUND, UNCOUNTED
from xlscale.parallel.sharded import KINDS
from xlscale.training.metrics import read_metrics


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 x 2 ranks has found."""
    folder = tmp_path_factory.mktemp("checks")
    run(4, [str(ROOT / "tests/distributed/self_check_cases.py"), str(folder)], folder / "log", timeout=300)
    return [json.loads((folder / f"checks-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("case", SOUND)
def test_sound_parallelism_passes_and_leaves_nothing_behind(case: str, ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["sound"][case]
        assert found["said"] == ""
        assert found["random_state_kept"] and found["engines_left"] == 0
        assert rank["new files"] == []


NAMES = {
    "norm attribute": f"the gradient norm of {UNCOUNTED} is ",
    "partition group": "the gradient of encoder.",
    "column input": "the gradient of encoder.",
    "tokens": "the gradient of encoder.",
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_parallelism_stops_all_ranks_with_one_line_that_names_a_parameter(
    case: str, ranks: list[dict[str, Any]]
) -> None:
    (line,) = {rank["broken"][case]["said"] for rank in ranks}
    assert line.startswith("self-check: ") and "\n" not in line
    assert NAMES[case] in line and "in plain torch" in line
    assert "parallel.self_check = false goes on without the check" in line


@pytest.mark.parametrize("stage", ["0", "1", "3"])
def test_one_wrong_bit_on_one_tensor_parallel_rank_is_named_on_all_ranks(
    stage: str, ranks: list[dict[str, Any]]
) -> None:
    for rank in ranks:
        found = rank["drift"][stage]
        assert found["untouched"] == found["with moments"] == found["mended"] == []
        assert [found[kind] for kind in KINDS] == [[NUDGED]] * len(KINDS)


def test_the_run_after_a_self_check_is_the_same_to_the_bit(tiny_config: ConfigFor, tmp_path: Path) -> None:
    changes = shape_changes("dp2-tp2") | {
        "training.total_steps": 5,
        "model.hidden_dropout_prob": 0.1,
        "model.attention_probs_dropout_prob": 0.1,
    }
    configs = [
        tiny_config(tmp_path, name, changes | {"parallel.self_check": check})
        for name, check in (("checked", True), ("unchecked", False))
    ]
    run(4, [WORKER, *map(str, configs)], tmp_path / "log", timeout=240)
    with_check, without = (
        [(r["loss"], r["grad_norm"], r["loss_per_language"]) for r in read_metrics(tmp_path / name)]
        for name in ("checked", "unchecked")
    )
    assert len(with_check) == 5 and with_check == without
    assert "self-check: a tiny model trains as in plain torch" in (tmp_path / "checked" / "log.txt").read_text()
    assert "self-check" not in (tmp_path / "unchecked" / "log.txt").read_text()


def test_parameter_that_tp_plan_does_not_know_stops_the_start_by_name(tiny_config: ConfigFor, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "unknown", shape_changes("dp1-tp2"))
    forget = "from xlscale.parallel.tensor_parallel import TP_PLAN; del TP_PLAN['mlp_norm']; "
    processes = start(
        2, ["-c", forget + "from xlscale.cli import main; main()", "train", str(config)], tmp_path / "unknown.log"
    )
    try:
        assert [process.wait(120) for process in processes] == [2, 2]
    finally:
        stop(processes)
    output = (tmp_path / "unknown.log.0").read_text()
    assert "Traceback" not in output
    assert "parameter encoder.layers.0.mlp_norm.weight is in no class of TP_PLAN" in output
    assert not (tmp_path / "unknown" / "metrics.jsonl").exists()
