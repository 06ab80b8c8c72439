"""One update: its micro-steps, forward and backward, the optimizer, and what is to be known about it afterwards."""

import math
import resource
import time
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from xlscale.config import Config
from xlscale.data.masking import IGNORE
from xlscale.data.sampling import micro_batch_slots
from xlscale.data.stream import Batch, Stream
from xlscale.models.dropout import key_of
from xlscale.parallel.zero import ShardedModel, accumulation_steps
from xlscale.training.schedule import lr_at

LOSS, MASKED, CORRECT, TOKENS = range(4)
"""Columns of the sums that are kept per language."""


def run_update(sharded: ShardedModel, stream: Stream, config: Config, step: int) -> dict[str, Any]:
    """Do update `step` (0-based) on this rank's slots and return its metrics, the same on all ranks.

    The loss is the sum over the update's masked tokens divided by their number over all ranks and micro-steps, so the
    gradient does not depend on accumulation or data-parallel size.
    """
    topology, engine, training = sharded.topology, sharded.engine, config.training
    started = time.perf_counter()
    micro_steps = accumulation_steps(config, topology)
    batches = [
        stream.batch(
            micro_batch_slots(
                step, i, topology.dp_rank, topology.dp, training.micro_batch_size, training.global_batch_size
            )
        )
        for i in range(micro_steps)
    ]
    sums = torch.zeros(len(stream.languages), 4, dtype=torch.float64)
    for batch in batches:
        _count(sums, batch)
    masked = sums[:, MASKED].sum()
    dist.all_reduce(masked := masked.to(topology.device), group=topology.dp_group)
    data_seconds = time.perf_counter() - started

    learning_rate = lr_at(step, config.optimizer.learning_rate, config.schedule, training.total_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    sums = sums.to(topology.device)
    skipped_before = engine.skipped_steps
    # DeepSpeed averages over the data-parallel ranks; what is wanted is the sum over the update's own count.
    scale = topology.dp / max(float(masked), 1.0)
    for batch in batches:
        first_slot = int(batch.slots[0])
        sharded.dropout_key.set(training.seed, first_slot)
        # Attention's own dropout draws from torch's state: each tensor-parallel rank its own, for its own heads.
        torch.manual_seed(key_of(training.seed, "attention", first_slot, topology.tp_rank))
        ids, labels, mask, languages = (_on(topology.device, a) for a in _arrays(batch))
        output = engine(ids, labels, mask)
        engine.backward(output.losses_M.sum() * scale, scale_wrt_gas=False)
        engine.step()
        rows = languages[output.rows_M]
        sums[:, LOSS].index_add_(0, rows, output.losses_M.detach().double())
        sums[:, CORRECT].index_add_(0, rows, output.correct_M.double())
    dist.all_reduce(sums, group=topology.dp_group)

    per_language = sums.cpu().numpy()
    seconds = time.perf_counter() - started
    tokens = int(per_language[:, TOKENS].sum())
    return {
        "step": step + 1,
        "slot": (step + 1) * training.global_batch_size,
        "time": time.time(),
        "loss": _mean(per_language.sum(0), LOSS),
        "grad_norm": _finite(float(engine.get_global_grad_norm())),
        "learning_rate": learning_rate,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "masked_tokens": int(per_language[:, MASKED].sum()),
        "masked_accuracy": _mean(per_language.sum(0), CORRECT),
        "loss_per_language": {
            code: _mean(row, LOSS) for code, row in zip(stream.languages, per_language, strict=True) if row[MASKED]
        },
        "tokens_per_language": {
            code: int(row[TOKENS]) for code, row in zip(stream.languages, per_language, strict=True) if row[TOKENS]
        },
        "skipped": engine.skipped_steps > skipped_before,
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "memory_gib": _peak_memory() / 2**30,
        "dp": topology.dp,
        "tp": topology.tp,
        "accumulation": micro_steps,
    }


def _count(sums: torch.Tensor, batch: Batch) -> None:
    """Add a batch's masked and real tokens to the sums of their languages."""
    languages = torch.from_numpy(batch.languages)
    masked_B = torch.from_numpy((batch.labels != IGNORE).sum(1))
    real = (
        np.full(len(batch.slots), batch.input_ids.shape[1])
        if batch.attention_mask is None
        else batch.attention_mask.sum(1)
    )
    sums[:, MASKED].index_add_(0, languages, masked_B.double())
    sums[:, TOKENS].index_add_(0, languages, torch.from_numpy(real).double())


def _arrays(batch: Batch) -> tuple[np.ndarray | None, ...]:
    return batch.input_ids, batch.labels, batch.attention_mask, batch.languages


def _on(device: torch.device, array: np.ndarray | None) -> Any:
    return None if array is None else torch.from_numpy(array).to(device, non_blocking=True)


def _mean(row: np.ndarray, column: int) -> float | None:
    return _finite(row[column] / row[MASKED]) if row[MASKED] else None


def _finite(value: float) -> float | None:
    # JSON has no NaN; a value that is not finite stands as null.
    return float(value) if math.isfinite(value) else None


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
