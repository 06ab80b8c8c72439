"""One update: its micro-steps, forward and backward, the optimizer, and what is to be known about it afterwards.

L languages, C columns of sums, B rows of a micro-batch, M masked positions
"""

import math
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from xlscale.config_sections import Config
from xlscale.data.loader import Loader, RankSlots
from xlscale.data.masking import IGNORE
from xlscale.data.stream import Batch
from xlscale.parallel.engine_config import accumulation_steps
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import Topology
from xlscale.training.data_faults import DataFaults, Replacements, agree, by_shard, gather
from xlscale.training.faults import Faults
from xlscale.training.generators import seed_generators
from xlscale.training.inputs import model_inputs
from xlscale.training.routing import adapters_of, grouped, sum_and_agree
from xlscale.training.schedule import lr_at

COLUMNS = LOSS, MASKED, CORRECT, TOKENS, SAMPLES, REPLACED, ASKED, WRITING, FAILED = range(9)
"""Columns of the sums that are kept per language; tokens without padding, samples with those that were replaced.

The last ones ride along in the first row, of no language: samples that were replaced, and the ranks of each of News.
"""


class News(NamedTuple):
    """What a rank tells all others with an update's sums, and then: whether any rank has told it."""

    asked: bool = False
    """It has been asked to end the run."""
    writing: bool = False
    """It still writes its part of a checkpoint."""
    failed: bool = False
    """What it did behind the training has failed."""


NEWS = [ASKED, WRITING, FAILED]
"""Its columns."""


@dataclass(frozen=True)
class Passed:
    """What forward and backward over an update's micro-batches gave."""

    sums_LC: torch.Tensor
    """Per language the columns above, over all ranks."""
    loss: torch.Tensor
    """Mean over the update's masked tokens, fp64, the same to the bit on all ranks; 0 when nothing was masked."""
    micro_losses: list[torch.Tensor]
    """The same of each of this rank's micro-batches, fp32."""


@dataclass(frozen=True)
class Update:
    """One update that was done, or skipped."""

    record: dict[str, Any]
    """Its metrics, the same on all ranks."""
    fault: str
    """Why it was skipped; empty when it was applied."""
    batches: list[Batch]
    """This rank's micro-batches."""
    replaced: Replacements
    """Samples of all ranks that stand for others, whose shard cannot be used."""
    news: News
    """What any rank had to tell; the same on all ranks."""


def run_update(
    sharded: ShardedModel,
    loader: Loader,
    config: Config,
    faults: Faults,
    data_faults: DataFaults,
    step: int,
    news: Callable[[], News] = News,
) -> Update:
    """Do update `step` (0-based) on this rank's slots; `faults` says whether it may be applied.

    It and `data_faults` take note of the update.

    The loss is the sum over the update's masked tokens divided by their number over all ranks and micro-steps, so the
    gradient does not depend on accumulation or data-parallel size.
    """
    topology, engine, training = sharded.topology, sharded.engine, config.training
    languages = loader.stream.languages
    started = time.perf_counter()
    batches = agree(loader.batches(step), topology)
    data_seconds = time.perf_counter() - started

    learning_rate = lr_at(step, config.optimizer.learning_rate, config.schedule, training.total_steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate
    skipped_before = sharded.skipped_updates
    passed = forward_and_backward(sharded, batches, languages, training.seed, faults.limit, news)
    engine.step()

    per_language = passed.sums_LC.cpu().numpy()
    total = per_language.sum(0)
    loss, grad_norm = float(passed.loss), sharded.grad_norm
    fault = faults.reason(loss, grad_norm)
    skipped = sharded.skipped_updates > skipped_before
    assert skipped == bool(fault), f"update {step + 1}: the engine's skipped={skipped}, but fault={fault!r}"
    faults.note(step + 1, loss if total[MASKED] else None, fault)
    replaced = gather(batches, topology) if total[REPLACED] else Replacements()
    data_faults.note(replaced)
    seconds = time.perf_counter() - started
    record: dict[str, Any] = {
        "step": step + 1,
        "slot": (step + 1) * training.global_batch_size,
        "time": time.time(),
        "loss": _finite(loss) if total[MASKED] else None,
        "grad_norm": _finite(grad_norm),
        "learning_rate": learning_rate,
        "tokens": int(total[TOKENS]),
        "tokens_per_second": int(total[TOKENS]) / seconds,
        "masked_tokens": int(total[MASKED]),
        "masked_accuracy": _mean(total, CORRECT),
        "loss_per_language": {
            code: _mean(row, LOSS) for code, row in zip(languages, per_language, strict=True) if row[MASKED]
        },
        "tokens_per_language": _counts(languages, per_language[:, TOKENS]),
        "samples_per_language": _counts(languages, per_language[:, SAMPLES]),
        "skipped_updates": len(faults.skipped),
        "replaced_samples": data_faults.samples.total(),
        "step_seconds": seconds,
        "data_seconds": data_seconds,
        "memory_gib": _peak_memory() / 2**30,
        "dp": topology.dp,
        "tp": topology.tp,
        "accumulation": len(batches),
    }
    if replaced:
        record["replaced"] = by_shard(replaced)
    return Update(record, fault, batches, replaced, News(*map(bool, total[NEWS])))


def my_slots(config: Config, topology: Topology) -> RankSlots:
    """The slots of each of this rank's micro-batches, by update (0-based)."""
    return RankSlots(
        topology.dp_rank,
        topology.dp,
        accumulation_steps(config, topology),
        config.training.micro_batch_size,
        config.training.global_batch_size,
        config.data.language_run if config.data.languages_per_micro_step else 0,
    )


def forward_and_backward(
    sharded: ShardedModel,
    batches: list[Batch],
    languages: Sequence[str],
    seed: int,
    limit: float | None,
    news: Callable[[], News] = News,
) -> Passed:
    """Forward and backward over this rank's micro-batches of one update; engine.step() would end it.

    A loss that is not finite, or is above `limit`, makes the gradient NaN on all ranks, and the engine then skips.
    That is decided on the device, between the last forward and its backward. limit None: the gradient is left as it is.
    `languages`: the stream's. A model with adapters is told of those of the update; ConfigError on all ranks when a
    micro-step has not the same ones on all.
    `news` is called as late as its answer can still go with the update's sums.
    """
    topology, engine = sharded.topology, sharded.engine
    model = engine.module.config
    sums_LC = torch.zeros(len(languages), len(COLUMNS), dtype=torch.float64)
    for batch in batches:
        _count(sums_LC, batch)
    mine = float(sums_LC[:, MASKED].sum())
    adapters = adapters_of(languages, model) if model.languages else None
    if adapters is None:
        masked = sum_over_ranks(mine, topology)
    else:
        batches = [grouped(batch, adapters) for batch in batches]
        masked = sum_and_agree(mine, batches, languages, topology)
        sharded.train_adapters({languages[i] for batch in batches for i in batch.languages})
    sums_LC = sums_LC.to(topology.device)
    # DeepSpeed averages over the data-parallel ranks; what is wanted is the sum over the update's own count.
    scale = topology.dp / max(masked, 1.0)
    # Widths that tensor cores like, few enough that the allocator meets them again; tensor-parallel ranks share them.
    multiple = math.lcm(8, topology.tp)
    micro_losses = []
    for number, batch in enumerate(batches):
        if number:
            engine.step()  # inside an update it only counts the micro-step
        sharded.dropout_key.set(seed, int(batch.slots[0]))
        lang_ids = {} if adapters is None else {"lang_ids": torch.from_numpy(adapters[batch.languages])}
        seed_generators(seed, int(batch.slots[0]))
        output = engine(**model_inputs(batch, topology.device, model.pad_token_id, multiple), **lang_ids)
        losses_M = output.losses_M.detach()
        language_M = torch.from_numpy(batch.languages).to(topology.device, non_blocking=True)[output.rows_M]
        sums_LC[:, LOSS].index_add_(0, language_M, losses_M.double())
        sums_LC[:, CORRECT].index_add_(0, language_M, output.correct_M.double())
        micro_losses.append(losses_M.sum() / max(len(losses_M), 1))
        verdict: Any = None
        if number == len(batches) - 1:
            for column, told in zip(NEWS, news(), strict=True):
                if told:
                    sums_LC[0, column] = 1.0
            # Over the world and not dp: tensor-parallel ranks must not come to two verdicts for a last bit.
            dist.all_reduce(sums_LC)
            sums_LC /= topology.tp
            loss = sums_LC[:, LOSS].sum() / sums_LC[:, MASKED].sum().clamp(min=1.0)
            if limit is not None:
                verdict = _condemn(sharded, loss.isfinite() & (loss <= limit))
        engine.backward(output.losses_M.sum() * scale, scale_wrt_gas=False)
        if verdict is not None:
            verdict.remove()
    return Passed(sums_LC, loss, micro_losses)


def sum_over_ranks(value: float, topology: Topology) -> float:
    """The sum over the data-parallel ranks."""
    total = torch.tensor(value, dtype=torch.float64, device=topology.device)
    dist.all_reduce(total, group=topology.dp_group)
    return float(total)


def _condemn(sharded: ShardedModel, good: torch.Tensor) -> Any:
    """Make the coming backward's gradient NaN unless `good` (0-d, on the device); gives the hook, to be removed.

    The gradient of one parameter, the smallest that every batch reaches, is multiplied by 1 or NaN. Multiplying the
    loss would do nothing where the last micro-batch has no masked token: its loss is a sum of nothing, and hands no
    gradient on.
    """
    shapes = sharded.full_shapes()
    trained = {
        name: parameter
        for name, parameter in sharded.named_parameters()
        if parameter.requires_grad and ".adapters." not in name  # those of absent languages get no gradient
    }
    smallest = min(trained, key=lambda name: math.prod(shapes[name]))
    factor = torch.where(good, 1.0, math.nan)
    return trained[smallest].register_hook(lambda gradient: gradient * factor.to(gradient.dtype))


def _count(sums: torch.Tensor, batch: Batch) -> None:
    """Add a batch's masked and real tokens and its samples to the sums of their languages."""
    languages = torch.from_numpy(batch.languages)
    masked_B = torch.from_numpy((batch.labels != IGNORE).sum(1))
    real = (
        np.full(len(batch.slots), batch.input_ids.shape[1])
        if batch.attention_mask is None
        else batch.attention_mask.sum(1)
    )
    sums[:, MASKED].index_add_(0, languages, masked_B.double())
    sums[:, TOKENS].index_add_(0, languages, torch.from_numpy(real).double())
    sums[:, SAMPLES].index_add_(0, languages, torch.ones(len(languages), dtype=torch.float64))
    # Of which language they are nobody asks: one number in an exchange that is there anyway.
    sums[0, REPLACED] += len(batch.replaced)


def _counts(languages: list[str], counts_L: np.ndarray) -> dict[str, int]:
    """Of the languages that an update had, how many each."""
    return {code: int(count) for code, count in zip(languages, counts_L, strict=True) if count}


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
