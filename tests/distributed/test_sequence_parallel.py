"""What split models keep for the backward pass, which noise they draw, and which lengths they refuse."""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run

WORKER = str(ROOT / "tests" / "distributed" / "token_cases.py")


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_noise_agrees_where_it_must_and_saved_activations_fall_to_one_over_tp(ranks: int, tmp_path: Path) -> None:
    run(ranks, [WORKER], tmp_path / "log", timeout=300)
    assert "all hold" in (tmp_path / "log.0").read_text()
