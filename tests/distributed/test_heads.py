"""Every head over tensor-parallel ranks and under ZeRO-3: outputs, loss and gradients."""

from pathlib import Path

import pytest

from tests.distributed.launch import ROOT, run
from xlscale.models.heads import HEADS

WORKER = str(ROOT / "tests" / "distributed" / "head_cases.py")


@pytest.mark.parametrize("how", ["split", "zero"])
def test_outputs_losses_and_gradients_are_those_of_one_process(how: str, tmp_path: Path) -> None:
    run(2, [WORKER, how], tmp_path / "log", timeout=240)
    assert (tmp_path / "log.0").read_text().count("is the same") == len(HEADS)
