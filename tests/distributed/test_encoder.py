"""Adapters, cross-attention and relative positions over tensor-parallel ranks and under ZeRO-3: loss and gradients."""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run

WORKER = str(ROOT / "tests" / "distributed" / "encoder_cases.py")


@pytest.mark.parametrize("how", ["split", "zero"])
def test_losses_and_gradients_are_those_of_one_process(how: str, tmp_path: Path) -> None:
    run(2, [WORKER, how], tmp_path / "log", timeout=200)
    assert (tmp_path / "log.0").read_text().count("is the same") == 3
