"""Split over tensor-parallel ranks and under ZeRO, with and without sequence parallelism and recomputed layers: loss
and gradients of every kind of layer are those of the whole model."""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run

CASES = ROOT / "tests" / "distributed"


@pytest.mark.parametrize(
    ("how", "ranks", "cases"), [("split", 2, 7), pytest.param("split", 4, 7, marks=pytest.mark.slow), ("zero", 2, 5)]
)
def test_losses_and_gradients_are_those_of_one_process(how: str, ranks: int, cases: int, tmp_path: Path) -> None:
    run(ranks, [str(CASES / "encoder_cases.py"), how], tmp_path / "log", timeout=300)
    assert (tmp_path / "log.0").read_text().count("is the same") == cases


def test_every_zero_stage_takes_sequence_parallelism_and_recomputed_layers(tmp_path: Path) -> None:
    run(4, [str(CASES / "engine_cases.py")], tmp_path / "log", timeout=300)
    assert (tmp_path / "log.0").read_text().count("is the same") == 21
