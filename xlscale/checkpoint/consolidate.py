"""A checkpoint's partitions -> rows of full tensors, a few MiB at a time -> a Hub folder."""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path

import torch

from xlscale.checkpoint.card import checkpoint_card
from xlscale.checkpoint.hub import MAX_SHARD_SIZE, HubWriter, hub_writer, write_alone
from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.store import MANIFEST, Checkpoint
from xlscale.checkpoint.weights import MAPPED
from xlscale.config import load_config
from xlscale.config_sections import Config
from xlscale.parallel.sharded import FP32, KINDS

log = logging.getLogger(__name__)

TOKENS_SEEN = "tokens_seen"
"""State of a checkpoint: language -> its tokens in the updates that were applied."""
PIECE = 1 << 21
"""Elements read at a time: few enough that they are still in a cache when they are written."""


def open_checkpoint(path: Path, kinds: Collection[str] = KINDS) -> Checkpoint:
    """The checkpoint at `path`: a step's folder, a folder of them or a run's folder (then the newest whole one).

    kinds: what will be read of its partitions; their digests are checked, and those of all else.
    """
    if (path / MANIFEST).exists():
        checkpoint = Checkpoint.open(path)
        if damaged := checkpoint.damaged(checkpoint.manifest["files"], kinds):
            raise ValueError(f"{', '.join(damaged)}: damaged (not the manifest's digest); use another step")
        return checkpoint
    found_newest = newest(path / "checkpoints", kinds=kinds) or newest(path, kinds=kinds)
    if found_newest is None:
        raise ValueError(f"{path} holds no whole checkpoint; give a run's folder or one of its checkpoints/step-*")
    return found_newest


class Consolidation:
    """The full tensors of a checkpoint, a few rows at a time; what is mapped of its files stays below MAPPED bytes."""

    def __init__(self, checkpoint: Checkpoint):
        # Of its own, for what is mapped by one that the caller keeps is never let go.
        self._checkpoint = Checkpoint(checkpoint.folder, checkpoint.manifest)
        self._read = 0

    def pieces(self, name: str, kind: str = FP32) -> Iterator[torch.Tensor]:
        """The rows of a parameter (or moment) in order, fp32."""
        rows, *rest = self._checkpoint.manifest["parameters"][name]["shape"]
        width = torch.Size(rest).numel()
        step = max(1, PIECE // width)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            self._read += (stop - start) * width * 4
            if self._read > MAPPED:
                self._checkpoint = Checkpoint(self._checkpoint.folder, self._checkpoint.manifest)
                self._read = 0
            yield self._checkpoint.rows(kind, name, start, stop)


def checkpoint_writer(
    checkpoint: Checkpoint,
    config: Config,
    out: Path,
    dtype: str,
    max_shard_size: int = MAX_SHARD_SIZE,
    adapters: bool = False,
) -> HubWriter:
    """The writer of a checkpoint's Hub folder."""
    shapes = {name: tuple(entry["shape"]) for name, entry in checkpoint.manifest["parameters"].items()}
    return hub_writer(
        out,
        config.model,
        shapes,
        checkpoint.folder / "tokenizer",
        dtype,
        max_shard_size,
        adapters=adapters,
        tokens_seen=tokens_seen(checkpoint, config),
    )


def tokens_seen(checkpoint: Checkpoint, config: Config) -> dict[str, int]:
    """Language -> tokens of it that the run has trained on, for every language of which that is all it has seen.

    A run that started from a folder cannot say it of languages that it has not trained on.
    """
    seen: dict[str, int] = checkpoint.state(TOKENS_SEEN)
    known = config.model.languages if seen and not config.training.init_from else seen
    return {language: seen.get(language, 0) for language in known}


def export_checkpoint(path: Path, out: Path, dtype: str = "fp32", adapters: bool = False) -> Path:
    """Write the Hub folder `out` from a checkpoint of any topology; no tensor is ever whole in memory.

    adapters: of a model of type xmod, each language's stand in a file of their own too.
    """
    checkpoint = open_checkpoint(path, (FP32,))
    config = load_config(checkpoint.folder / "config.toml")
    writer = checkpoint_writer(checkpoint, config, out, dtype, adapters=adapters)
    write_alone(writer, Consolidation(checkpoint).pieces, checkpoint_card(checkpoint, config, dtype))
    log.info("exported step %d of %s to %s", checkpoint.step, checkpoint.folder, out)
    return out
