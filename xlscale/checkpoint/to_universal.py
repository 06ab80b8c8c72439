"""A checkpoint of ours -> DeepSpeed's universal layout, which the engine loads at any shape; tensor by tensor.

<out>/global_step100_universal/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt
                               zero/optimizer_state.pt
                               mp_rank_00_model_states.pt                   for stages 1 and 2
                               zero_pp_rank_0_mp_rank_00_model_states.pt    for stage 3: the same
<out>/latest_universal
"""

import logging
import shutil
from math import prod
from pathlib import Path
from typing import Any

import torch

from xlscale.checkpoint.consolidate import Consolidation, open_checkpoint
from xlscale.checkpoint.engine_files import LATEST_UNIVERSAL, ZERO
from xlscale.checkpoint.engine_universal import OPTIMIZER, STEP
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import load_config
from xlscale.config_sections import Config
from xlscale.data.shards import fsync_path
from xlscale.models.adapters import language_of
from xlscale.parallel.sharded import KINDS
from xlscale.parallel.universal import (
    universal_entry,
    universal_model_states,
    universal_optimizer_state,
    universal_shape,
)
from xlscale.training.optimizer import DECAY, NO_DECAY
from xlscale.training.schedule import lr_at

log = logging.getLogger(__name__)

MODEL_STATES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def export_universal(path: Path, out: Path, tp: int = 0) -> Path:
    """Write the checkpoint at `path` into the folder `out` in the universal layout, and return the tag's folder.

    `path`: as of open_checkpoint. tp: of the run that will load it, for whose ranks the decoder's bias is filled up
    (0 = the checkpoint's). Memory: the largest tensor. ValueError when the folder is there, or cannot be written.
    """
    checkpoint = open_checkpoint(path)
    config = load_config(checkpoint.folder / "config.toml")
    tp = tp or checkpoint.manifest["topology"]["tp"]
    if tp < 1:
        raise ValueError(f"tp = {tp} is too small; use 1 or more")
    final = out.resolve() / f"global_step{checkpoint.step}_universal"
    partial = final.with_name(f"{final.name}.partial")
    if final.exists():
        raise ValueError(f"{final} is there, and a checkpoint is never written into; name another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        (partial / ZERO).mkdir(parents=True)
        _write(checkpoint, config, partial, tp)
        partial.rename(final)
        (out / LATEST_UNIVERSAL).write_text(final.name, encoding="utf-8")
        fsync_path(out / LATEST_UNIVERSAL)
        fsync_path(out)
    except OSError as error:
        raise ValueError(f"{final} could not be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log.info("exported step %d of %s in the universal layout to %s", checkpoint.step, checkpoint.folder, final)
    return final


def _write(checkpoint: Checkpoint, config: Config, partial: Path, tp: int) -> None:
    manifest = checkpoint.manifest
    shapes: dict[str, tuple[int, ...]] = {name: tuple(entry["shape"]) for name, entry in manifest["parameters"].items()}
    needed, free = 4 * len(KINDS) * sum(map(prod, shapes.values())), shutil.disk_usage(partial).free
    if needed > free:
        raise ValueError(f"{partial} needs {needed / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; make room")
    steps = manifest["optimizer_steps"]
    weights = Consolidation(checkpoint)
    for name, shape in shapes.items():
        folder = partial / ZERO / name
        folder.mkdir()
        for kind in KINDS:
            whole = _whole(weights, kind, name, universal_shape(name, shape, tp))
            _save(universal_entry(name, whole), folder / f"{kind}.pt")
            del whole  # two of them would be in memory else
        _save(torch.tensor(float(manifest["language_steps"].get(language_of(name), steps))), folder / STEP)
        fsync_path(folder)
    _save(universal_optimizer_state(_groups(config, checkpoint.step), steps), partial / ZERO / OPTIMIZER)
    skipped = len(checkpoint.state("faults").get("skipped", []))
    states = universal_model_states(shapes, config.model.vocab_size, tp, checkpoint.step, skipped, manifest["slot"])
    for name in MODEL_STATES:
        _save(states, partial / name)
    fsync_path(partial / ZERO)
    fsync_path(partial)


def _whole(weights: Consolidation, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter or moment, filled up with zero rows to `shape`."""
    whole, row = torch.zeros(shape), 0
    for piece in weights.pieces(name, kind):
        whole[row : row + len(piece)] = piece
        row += len(piece)
    return whole


def _groups(config: Config, step: int) -> list[dict[str, Any]]:
    """The hyper-parameters of our optimizer's groups, with the rate of the last update."""
    cfg = config.optimizer
    rate = lr_at(max(step - 1, 0), cfg.learning_rate, config.schedule, config.training.total_steps)
    alike = {"lr": rate, "betas": tuple(cfg.betas), "eps": cfg.eps}
    return [
        {"name": group, "weight_decay": decay} | alike for group, decay in ((DECAY, cfg.weight_decay), (NO_DECAY, 0.0))
    ]


def _save(content: Any, path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's word for a disk that takes no more
        raise OSError(f"{path}: {error}") from None
    fsync_path(path)
