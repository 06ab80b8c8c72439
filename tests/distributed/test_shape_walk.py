"""One run moves through five shapes, ten updates at each, and is the run that never moved."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.distributed.conftest import BATCH, WORKER, ConfigFor
from tests.distributed.launch import run
from xlscale.checkpoint.reshard import reshard
from xlscale.checkpoint.store import Checkpoint
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.optimizer import NO_DECAY, group_of

EACH = 10
SHAPES = [(1, 1), (2, 1), (2, 2), (1, 2), (1, 1)]
"""(data-parallel, tensor-parallel) of each ten updates."""
UPDATES = EACH * len(SHAPES)
WAYS = {"zero-3": [3, 3, 3, 3, 3], "every-stage": [3, 2, 3, 1, 0], "resharded": [3, 3, 3, 3, 3]}
"""Name -> ZeRO stage at each shape; the last is cut for the next shape before each move."""
BF16 = "bf16"
LOSS, WEIGHT, MOMENT = 1e-5, 1e-5, 1e-6
"""Relative; relative in the L2 norm of a tensor; absolute, of moments whose elements go up to 2e-2."""
DECAY = 0.5
"""It takes a hundredth off what it decays for ten updates: a norm that is decayed at one shape only shows."""

pytestmark = pytest.mark.slow

Train = Callable[[str, list[tuple[int, int]], list[int]], Path]


@pytest.fixture(scope="module")
def walk(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """(name, shapes, stages) -> run folder, after as many launches as shapes."""
    root = tmp_path_factory.mktemp("walk")

    def train(name: str, shapes: list[tuple[int, int]], stages: list[int]) -> Path:
        for leg, ((dp, tp), stage) in enumerate(zip(shapes, stages, strict=True), 1):
            changes = {
                "training.total_steps": UPDATES,
                "training.stop_after": leg * UPDATES // len(shapes),
                "training.micro_batch_size": BATCH // (2 * dp),
                "parallel.tensor_parallel": tp,
                "parallel.zero_stage": stage,
                "optimizer.weight_decay": DECAY,
                "model.vocab_size": 641,
                "checkpoint.every": 0,
                "training.precision": "bf16" if name == BF16 else "fp32",
            }
            if name == "resharded" and leg > 1:
                move(root / name, (leg - 1) * EACH, dp, tp)
            config = tiny_config(root, name, changes)
            run(dp * tp, [WORKER, str(config)], root / f"{name}-{leg}.log", timeout=240)
        return root / name

    return train


def move(run_dir: Path, step: int, dp: int, tp: int) -> None:
    """Put the checkpoint of `step` as another shape has it in the place of the one that is there."""
    folder = run_dir / "checkpoints"
    there = reshard(folder / f"step-{step:08d}", run_dir / "cut", dp, tp)
    shutil.rmtree(folder / there.name)
    there.rename(folder / there.name)


def probed(run_dir: Path) -> list[str]:
    """What the log says of the probe, a line for each time that it was compared."""
    lines = (run_dir / "log.txt").read_text().splitlines()
    found = [line for line in lines if "the probe's logits are those of the checkpoint" in line]
    print("\n".join(found))
    return found


@pytest.fixture(scope="module")
def stayed(walk: Train) -> Path:
    return walk("stayed", [(1, 1)], [3])


@pytest.mark.parametrize("way", WAYS)
def test_a_run_that_walks_through_the_shapes_is_the_run_that_never_moved(way: str, walk: Train, stayed: Path) -> None:
    moved = walk(way, SHAPES, WAYS[way])
    walked, wanted = read_metrics(moved), read_metrics(stayed)
    assert [(r["dp"], r["tp"]) for r in walked] == [shape for shape in SHAPES for _ in range(EACH)]
    for key in ("step", "slot", "learning_rate", "masked_tokens", "tokens_per_language", "samples_per_language"):
        assert [r[key] for r in walked] == [r[key] for r in wanted], key
    off = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(walked, wanted, strict=True))
    print(f"{way}: losses off by {off:.1e}")
    assert off <= LOSS
    resumed = [event["step"] for event in read_events(moved) if event["event"] == "resume"]
    assert resumed == [EACH * leg for leg in range(1, len(SHAPES))]
    assert len(probed(moved)) == len(resumed)

    found, there = (Checkpoint.open(folder / "checkpoints" / f"step-{UPDATES:08d}") for folder in (moved, stayed))
    assert found.manifest["optimizer_steps"] == UPDATES
    moments, weights, undecayed = 0.0, {}, {}
    for name in there.manifest["parameters"]:
        for kind in ("exp_avg", "exp_avg_sq"):
            pair = [checkpoint.full(name, kind) for checkpoint in (found, there)]
            if kind == "exp_avg_sq":  # as Adam uses it; squares are so small that anything would do
                pair = [moment.sqrt() for moment in pair]
            moments = max(moments, float((pair[0] - pair[1]).abs().max()))
        weight = there.full(name)
        relative = float((found.full(name) - weight).norm() / weight.norm())
        if not name.endswith("attention.key.bias"):  # its true gradient is zero: Adam makes updates of rounding
            (undecayed if group_of(name) == NO_DECAY else weights)[name] = relative
    print(
        f"{way}: moments off by {moments:.1e}, decayed {max(weights.values()):.1e}, not {max(undecayed.values()):.1e}"
    )
    assert moments <= MOMENT
    assert not {name: off for name, off in (weights | undecayed).items() if off > WEIGHT}


def test_bf16_logits_are_known_again_at_every_shape(walk: Train, stayed: Path) -> None:
    moved = walk(BF16, SHAPES, WAYS["every-stage"])
    assert len(probed(moved)) == len(SHAPES) - 1
    walked, wanted = read_metrics(moved), read_metrics(stayed)
    assert [r["samples_per_language"] for r in walked] == [r["samples_per_language"] for r in wanted]
    assert [r["loss"] for r in walked] == pytest.approx([r["loss"] for r in wanted], rel=3e-2)
