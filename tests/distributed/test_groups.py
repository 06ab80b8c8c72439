"""The optimizer's groups when a run goes on: what the config changed is told, all else is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import ConfigFor, shape_changes
from xlscale.checkpoint.retention import folder_name
from xlscale.checkpoint.store import MANIFEST, Checkpoint, _seal
from xlscale.config import ConfigError, load_config
from xlscale.training.loop import train
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.optimizer import DECAY, NO_DECAY, group_of

NORM = "encoder.final_norm.weight"


@pytest.fixture
def begun(tiny_config: ConfigFor, tmp_path: Path) -> Path:
    """The config of a run of two updates, whose folder lies beside it."""
    config = tiny_config(
        tmp_path, "run", shape_changes("dp1-tp1") | {"training.total_steps": 3, "schedule.warmup_steps": 2}
    )
    train(load_config(config, ["training.stop_after=2"]))
    return config


def manifest_of(config: Path, step: int) -> dict[str, Any]:
    return Checkpoint.open(config.parent / "run" / "checkpoints" / folder_name(step)).manifest


def test_manifest_names_every_parameters_group_and_its_hyperparameters(begun: Path) -> None:
    manifest, optimizer = manifest_of(begun, 2), load_config(begun).optimizer
    shared = {"betas": optimizer.betas, "eps": optimizer.eps}
    assert manifest["groups"] == {
        DECAY: {"weight_decay": optimizer.weight_decay, **shared},
        NO_DECAY: {"weight_decay": 0.0, **shared},
    }
    assert {name: entry["group"] for name, entry in manifest["parameters"].items()} == {
        name: group_of(name) for name in manifest["parameters"]
    }


def test_changed_fields_of_the_optimizer_go_on_and_stand_in_the_events(begun: Path) -> None:
    train(load_config(begun, ["optimizer.weight_decay=0.5", "optimizer.betas=[0.8, 0.9]"]))
    assert {name: group["weight_decay"] for name, group in manifest_of(begun, 3)["groups"].items()} == {
        DECAY: 0.5,
        NO_DECAY: 0.0,
    }
    (resumed,) = (event for event in read_events(begun.parent / "run") if event["event"] == "resume")
    assert "optimizer.weight_decay was 0.01 and is 0.5" in resumed["changed"]
    assert "optimizer.betas was [0.9, 0.98] and is [0.8, 0.9]" in resumed["changed"]


def moved(manifest: dict[str, Any]) -> None:
    manifest["parameters"][NORM]["group"] = DECAY


def other_decay(manifest: dict[str, Any]) -> None:
    manifest["groups"][NO_DECAY]["weight_decay"] = 0.3


def frozen(manifest: dict[str, Any]) -> None:
    manifest["parameters"][NORM]["group"] = None


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (moved, f"{NORM}: weight_decay was 0.01 \\(group decay\\) and is 0.0 \\(group no_decay\\); no field"),
        (other_decay, ": weight_decay was 0.3 \\(group no_decay\\) and is 0.0 \\(group no_decay\\), and .* more; no"),
        (frozen, f"{NORM}: weight_decay was None \\(group None\\) and is 0.0 \\(group no_decay\\), and 2 more; no"),
    ],
)
@pytest.mark.parametrize("override", [[], ["optimizer.weight_decay=0.5"]])
def test_groups_that_differ_otherwise_are_refused_by_name(
    change: Any, line: str, override: list[str], begun: Path
) -> None:
    manifest = manifest_of(begun, 2)
    change(manifest)
    path = begun.parent / "run" / "checkpoints" / folder_name(2) / MANIFEST
    path.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    with pytest.raises(ValueError, match=f"the optimizer would go on otherwise than it was saved: .*{line}") as refused:
        train(load_config(begun, override))
    assert "\n" not in str(refused.value) and not isinstance(refused.value, ConfigError)
    assert len(read_metrics(begun.parent / "run")) == 2
