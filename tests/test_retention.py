"""Which checkpoints stay, and what a kill in the middle of a removal leaves."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xlscale.checkpoint.retention import (
    BEST,
    LATEST,
    folder_name,
    folders,
    kept,
    point_at,
    remove_leftovers,
    retain,
    set_aside,
)
from xlscale.config import load_config
from xlscale.config_rules import CHOICES
from xlscale.config_sections import CheckpointConfig
from xlscale.data.shards import disk_is_full
from xlscale.training.metrics import MetricsLog, read_metrics

DEMO = Path(__file__).parents[1] / "configs" / "demo.toml"
STEPS = st.dictionaries(
    st.integers(1, 60), st.fixed_dictionaries({}, optional={"loss": st.integers(0, 9)}), max_size=30
)


@given(means=STEPS, keep=st.integers(0, 5), every=st.integers(0, 7), best=st.integers(0, 4))
def test_newest_every_kth_and_best_stay_and_nothing_else(
    means: dict[int, dict[str, int]], keep: int, every: int, best: int
) -> None:
    stay = kept(means, CheckpointConfig(keep=keep, keep_every=every, keep_best=best))
    if keep == 0:
        assert stay == set(means)
        return
    newest = set(sorted(means)[-keep:])
    for_good = {step for step in means if every and step % every == 0}
    others = stay - newest - for_good
    assert stay >= newest | for_good and len(others) <= best
    measured = [step for step in means if "loss" in means[step]]
    assert all("loss" in means[step] for step in others)
    for step in others:  # fewer than `best` are better
        better = [m for m in measured if (means[m]["loss"], -m) < (means[step]["loss"], -step)]
        assert len(better) < best


@given(means=STEPS, best=st.integers(0, 3))
def test_what_stays_of_what_stayed_is_what_stays_of_all(means: dict[int, dict[str, int]], best: int) -> None:
    """So a run that is killed and saves some steps twice ends with the same folders."""
    cfg = CheckpointConfig(keep=2, keep_every=10, keep_best=best)
    there: dict[int, dict[str, int]] = {}
    for step in sorted(means):
        there[step] = means[step]
        there = {step: there[step] for step in kept(there, cfg)}
    assert set(there) == kept(means, cfg)


def test_accuracy_is_best_where_it_is_high() -> None:
    means = {1: {"loss": 1.0, "masked_accuracy": 0.9}, 2: {"loss": 0.5, "masked_accuracy": 0.1}, 3: {}}
    cfg = CheckpointConfig(keep=1, keep_best=1, best_metric="masked_accuracy")
    assert kept(means, cfg) == {1, 3}
    assert CHOICES["checkpoint.best_metric"] == tuple(BEST)


def written(root: Path, step: int, loss: float | None = None) -> Path:
    folder = root / folder_name(step)
    folder.mkdir(parents=True)
    if loss is not None:
        (folder / "means.json").write_text(json.dumps({"loss": loss}))
    return folder


def test_folders_are_removed_by_the_means_that_they_hold(tmp_path: Path) -> None:
    for step, loss in ((1, 0.5), (2, None), (3, 0.7), (4, 0.9), (5, 0.8)):
        written(tmp_path, step, loss)
    (written(tmp_path, 6) / "means.json").write_text("[")
    (written(tmp_path, 7) / "means.json").write_text("[1]")
    retain(tmp_path, CheckpointConfig(keep=1, keep_every=4, keep_best=2))
    assert [path.name for path in folders(tmp_path)] == [folder_name(step) for step in (7, 4, 3, 1)]
    assert not list(tmp_path.glob("*.removed"))


def test_what_a_killed_process_left_goes_and_what_is_set_aside_stays(tmp_path: Path) -> None:
    for name in ("step-00000001.removed", "step-00000002.partial", "step-00000003.broken"):
        (tmp_path / name / "tokenizer").mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003.broken"]
    assert set_aside(written(tmp_path, 3)).name == "step-00000003.broken-2"
    assert folders(tmp_path) == []


@pytest.mark.parametrize("how", ["missing", "dangling", "file", "folder"])
def test_pointer_is_made_anew_whatever_stands_there(how: str, tmp_path: Path) -> None:
    folder, latest = written(tmp_path, 5), tmp_path / LATEST
    if how == "dangling":
        latest.symlink_to("step-00000009")
    elif how == "file":
        latest.write_text("garbage")
    elif how == "folder":  # a copy that followed the link
        (latest / "tokenizer").mkdir(parents=True)
    point_at(folder)
    assert latest.is_symlink() and latest.resolve() == folder


def test_lines_that_a_full_disk_does_not_take_are_written_once_there_is_room(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = MetricsLog(tmp_path, load_config(DEMO, ["logging.wandb=disabled"]), 0, is_main=True)
    log.update({"step": 1})
    file = log._metrics._file
    disk, full = os.dup(file.fileno()), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, file.fileno())
    with caplog.at_level("WARNING", logger="xlscale"):
        log.update({"step": 2})
        log.update({"step": 3})
    assert caplog.text.count("the disk is full") == 1
    os.dup2(disk, file.fileno())
    log.update({"step": 4})
    log.close()
    os.close(disk), os.close(full)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_full_disk_is_told_from_other_errors() -> None:
    with pytest.raises(OSError, match="No space") as full, Path("/dev/full").open("wb", buffering=0) as file:
        file.write(b"x")
    assert disk_is_full(full.value)
    assert not disk_is_full(PermissionError(13, "Permission denied"))
