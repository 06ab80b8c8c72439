"""Samples to the adapters of their languages: the same adapters in the same order on all ranks, or the run stops.

ZeRO-3 gathers an adapter by a collective: ranks that ran different ones would hang, or take one for another.

B rows of a batch
"""

import zlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist

from xlscale.config import ConfigError
from xlscale.config_sections import ModelConfig
from xlscale.data.stream import Batch
from xlscale.parallel.topology import Topology


def adapters_of(languages: Sequence[str], model: ModelConfig) -> np.ndarray:
    """The adapter, a position in model.languages, of each of the stream's languages; ValueError where one has none."""
    without = [code for code in languages if code not in model.languages]
    if without:
        raise ValueError(
            f"data.shards has {', '.join(without)}, for which model.languages has no adapter; add them there, or "
            f"name in data.languages those to train on"
        )
    return np.array([model.languages.index(code) for code in languages], dtype=np.int64)


def grouped(batch: Batch, adapters: np.ndarray) -> Batch:
    """The batch with its rows in the order of their adapters, so that each runs once on rows that lie together."""
    order_B = np.argsort(adapters[batch.languages], kind="stable")
    if (np.diff(order_B) == 1).all():
        return batch
    return replace(
        batch,
        input_ids=batch.input_ids[order_B],
        labels=batch.labels[order_B],
        attention_mask=None if batch.attention_mask is None else batch.attention_mask[order_B],
        languages=batch.languages[order_B],
        slots=batch.slots[order_B],
        segments=None if batch.segments is None else batch.segments[order_B],
    )


def sum_and_agree(masked: float, batches: Sequence[Batch], languages: Sequence[str], topology: Topology) -> float:
    """The sum of `masked` over the data-parallel ranks; ConfigError on all ranks alike where they would differ.

    batches: this rank's micro-batches, grouped. Every rank must have the same languages in each of them.
    """
    present = [sorted({languages[i] for i in batch.languages}) for batch in batches]
    # 20 bits each: a sum of squares over thousands of ranks is exact, and equal to the square of the sum only if all
    # numbers are equal.
    marks = [float(zlib.crc32(",".join(codes).encode()) >> 12) for codes in present]
    mine = [masked, float(len(marks)), *(power for mark in marks for power in (mark, mark * mark))]
    sums = torch.tensor(mine, dtype=torch.float64, device=topology.device)
    dist.all_reduce(sums)
    total, _, *pairs = map(int, sums.tolist())
    ranks = topology.world_size
    if any(ranks * squares != mark * mark for mark, squares in zip(pairs[::2], pairs[1::2], strict=True)):
        everybody: list[list[list[str]]] = [[] for _ in range(ranks)]
        dist.all_gather_object(everybody, present)
        raise ConfigError([_line(everybody)])
    return total / topology.tp


def _line(everybody: list[list[list[str]]]) -> str:
    number = next(i for i in range(len(everybody[0])) if len({tuple(rank[i]) for rank in everybody}) > 1)
    shown = "; ".join(f"rank {rank} has {', '.join(steps[number])}" for rank, steps in enumerate(everybody))
    return (
        f"micro-step {number + 1} has different languages on different ranks: {shown}; an adapter must run on all "
        "ranks or on none. The schedule is at fault: report it, with config.toml; nothing was trained on this update"
    )
