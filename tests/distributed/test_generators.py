"""What draws from the global generators of torch, numpy or Python: the same draws, whatever interrupted the run."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.launch import ROOT, run
from tests.distributed.test_keeping import curve
from xlscale.training.metrics import read_metrics

WORKER = str(ROOT / "tests" / "distributed" / "noise_cases.py")
CHANGES: dict[str, Any] = {"training.total_steps": 6, "schedule.warmup_steps": 2, "model.hidden_dropout_prob": 0.1}


@pytest.fixture(scope="module")
def noisy(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs of two ranks, all of a model whose modules draw."""
    root = tmp_path_factory.mktemp("noise")
    two, split = (CHANGES | shape_changes(name) for name in ("dp2-tp1", "dp1-tp2"))
    dropped = two | {"model.attention_probs_dropout_prob": 0.1}
    cases: dict[str, dict[str, Any]] = {
        "whole": dropped,
        "begun": dropped | {"run.name": "resumed", "training.stop_after": 3},
        "ended": dropped | {"run.name": "resumed"},
        "dp2": two,
        "tp2": split,
        "recomputed": two | {"training.activation_checkpointing": 1},
    }
    run(2, [WORKER, *(str(tiny_config(root, name, case)) for name, case in cases.items())], root / "log", timeout=240)
    return root


def test_a_run_that_goes_on_draws_as_one_that_was_never_interrupted(noisy: Path) -> None:
    assert curve(noisy / "resumed") == curve(noisy / "whole")
    assert curve(noisy / "whole") != curve(noisy / "dp2")


@pytest.mark.parametrize("name", ["tp2", "recomputed"])
def test_tensor_parallel_ranks_and_layers_computed_again_draw_alike(name: str, noisy: Path) -> None:
    found, wanted = read_metrics(noisy / name), read_metrics(noisy / "dp2")
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in wanted], rel=tolerance), key
