"""A checkpoint's partitions -> full tensors, one at a time -> a Hub folder."""

import logging
from pathlib import Path

from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.store import MANIFEST, Checkpoint, newest
from xlscale.config import load_config

log = logging.getLogger(__name__)


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, a folder of them or a run's folder (then the newest whole one)."""
    if (path / MANIFEST).exists():
        checkpoint = Checkpoint.open(path)
        damaged = checkpoint.damaged(checkpoint.manifest["files"])
        if damaged:
            raise ValueError(f"{', '.join(damaged)}: damaged (sha256 differs from the manifest); use another step")
        return checkpoint
    found = newest(path / "checkpoints") or newest(path)
    if found is None:
        raise ValueError(f"{path} holds no whole checkpoint; give a run's folder or one of its checkpoints/step-*")
    return found


def export_checkpoint(path: Path, out: Path, dtype: str = "fp32") -> Path:
    """Write the Hub folder `out` from a checkpoint of any topology; peak memory is the largest single tensor."""
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint.folder / "config.toml")
    shapes = {name: tuple(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    write_hub_folder(
        out,
        config.model,
        shapes,
        checkpoint.full,
        tokenizer_folder=checkpoint.folder / "tokenizer",
        dtype=dtype,
    )
    log.info("exported step %d of %s to %s", checkpoint.step, checkpoint.folder, out)
    return out
