"""Which checkpoint folders there are and which stay; whatever goes is renamed first, so that a kill leaves no half.

step-00000100           a checkpoint            step-00000100.partial   being written
step-00000100.removed   being removed           step-00000100.broken    found broken, set aside for people
"""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from xlscale.config_sections import CheckpointConfig
from xlscale.data.shards import fsync_path

FOLDER_NAME = re.compile(r"step-(\d{8})")
LATEST = "latest"
MEANS = "means"
"""State of a checkpoint: means of metrics over the updates that led to it."""

BEST: dict[str, Callable[[float], float]] = {"loss": lambda mean: mean, "masked_accuracy": lambda mean: -mean}
"""checkpoint.best_metric -> what is small where the metric is good."""


def folder_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def folders(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    found = root.iterdir() if root.is_dir() else []
    return sorted((path for path in found if FOLDER_NAME.fullmatch(path.name)), reverse=True)


def kept(means: Mapping[int, Mapping[str, Any]], cfg: CheckpointConfig) -> set[int]:
    """Which of the steps stay: the newest, those for good, and the best; `means` has every step's, maybe empty.

    Of two that are equally good the later is better.
    """
    if cfg.keep == 0:
        return set(means)
    newest = sorted(means)[-cfg.keep :]
    for_good = [step for step in means if cfg.keep_every and step % cfg.keep_every == 0]
    values = {step: mean.get(cfg.best_metric) for step, mean in means.items()}
    ranked = sorted((BEST[cfg.best_metric](value), -step) for step, value in values.items() if value is not None)
    return {*newest, *for_good, *(-negative for _, negative in ranked[: cfg.keep_best])}


def retain(root: Path, cfg: CheckpointConfig) -> None:
    """Remove the checkpoints that do not stay."""
    by_step = {int(path.name.removeprefix("step-")): path for path in folders(root)}
    stay = kept({step: _means(path) for step, path in by_step.items()}, cfg)
    for step, path in by_step.items():
        if step not in stay:
            remove(path)


def _means(folder: Path) -> dict[str, Any]:
    """The means of a checkpoint; empty where it has none that can be read: it is then never the best."""
    try:
        found = json.loads((folder / f"{MEANS}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remove(folder: Path) -> None:
    """Remove a folder; whenever the process dies, what is left does not look like a checkpoint."""
    removed = folder.with_suffix(".removed")
    if removed.exists():
        shutil.rmtree(removed)
    folder.rename(removed)
    shutil.rmtree(removed)


def remove_leftovers(root: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for leftover in [*root.glob("*.partial"), *root.glob("*.removed")]:
        shutil.rmtree(leftover)


def point_at(folder: Path) -> None:
    """Let the link `latest` name this checkpoint; it is replaced in one step, and a copy of a folder there goes."""
    latest, link = folder.parent / LATEST, folder.parent / f"{LATEST}.partial-link"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.name)
    if latest.is_dir() and not latest.is_symlink():  # of somebody's copy that followed the link
        remove(latest)
    link.replace(latest)
    fsync_path(folder.parent)


def set_aside(folder: Path) -> Path:
    """Rename a broken checkpoint, so that nobody takes it for one; not a byte of it is removed."""
    number = 1
    while (aside := folder.with_suffix(".broken" if number == 1 else f".broken-{number}")).exists():
        number += 1
    folder.rename(aside)
    fsync_path(folder.parent)
    return aside
