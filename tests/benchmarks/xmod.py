"""What registered languages cost that are not there: an X-MOD step with 81 adapters a layer beside one with 8.

    python -m tests.benchmarks.xmod FOLDER [PAIRS]

Two data-parallel ranks train two models of xmod-base's widths and 2 layers at ZeRO-3 on a CPU, fp32, the same batches
in turns; a micro-step of 2 x 4 samples of 128 tokens has the same K languages in both. Printed are the medians, and the
extremes, of the ratios of the pairs at K = 4, the parts of the step, and the bytes that ZeRO-3 gathers in a micro-step
at K = 1, 2, 4, counted where the engine asks for them. Bar: 1.10.
"""

import json
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from deepspeed.runtime.zero import partition_parameters

from tests.distributed.launch import ROOT, run
from xlscale.config_sections import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.data.masking import IGNORE
from xlscale.data.stream import Batch
from xlscale.models.families import XMOD_LANGUAGES
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw
from xlscale.training.update import forward_and_backward

CODES = XMOD_LANGUAGES
FEW, PIECES, ROWS, TOKENS, K = 8, 32_000, 4, 128, 4
BAR = 1.10
gathered = 0
"""Bytes that this rank has been given by gathers."""


def count_gathers() -> None:
    """Note what the engine's gathers of parameters give."""
    gather = partition_parameters._dist_allgather_fn

    def counted(part: torch.Tensor, whole: torch.Tensor, group: object = None) -> object:
        global gathered
        gathered += whole.numel() * whole.element_size()
        return gather(part, whole, group)

    partition_parameters._dist_allgather_fn = counted


def model_of(languages: int, dp: int) -> Config:
    return Config(
        training=TrainingConfig(
            total_steps=1000, global_batch_size=ROWS * dp, micro_batch_size=ROWS, precision="fp32", max_grad_norm=1.0
        ),
        parallel=ParallelConfig(zero_stage=3),
        model=ModelConfig(
            model_type="xmod", vocab_size=PIECES, hidden_size=768, num_hidden_layers=2, num_attention_heads=12,
            intermediate_size=3072, languages=CODES[:languages], hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        data=DataConfig(shards="-", tokenizer="-", language_run=dp, languages_per_micro_step=K),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(warmup_steps=0),
    )  # fmt: skip


def batch_of(update: int, rank: int, dp: int, languages: int) -> Batch:
    """This rank's rows of a micro-step of so many languages, others from update to update."""
    rng = np.random.default_rng((update, rank))
    ids = rng.integers(5, PIECES, (ROWS, TOKENS))
    labels = np.where(rng.random(ids.shape) < 0.15, ids, IGNORE)
    present = np.sort((update + np.arange(languages)) % FEW)
    slots = np.arange(ROWS) + (update * dp + rank) * ROWS
    return Batch(ids, labels, None, np.repeat(present, ROWS // languages), slots)


def timed(sharded: ShardedModel, batch: Batch, languages: list[str]) -> tuple[float, float]:
    """Seconds of forward and backward, and of the optimizer's step."""
    started = time.perf_counter()
    forward_and_backward(sharded, [batch], languages, 0, None)
    between = time.perf_counter()
    sharded.engine.step()
    return between - started, time.perf_counter() - between


def measure(folder: Path, pairs: int) -> None:
    """What each rank does; the first one's findings go to a file."""
    count_gathers()
    with process_groups(1) as topology:
        models: dict[int, ShardedModel] = {}
        for languages in (FEW, len(CODES)):
            config = model_of(languages, topology.dp)
            models[languages] = build(config, topology, adamw)
            shapes = models[languages].full_shapes()
            models[languages].load(
                lambda _, name, a, b, c=config, s=shapes: initial_rows(name, s[name], c.model, 0, a, b)
            )
        times: dict[int, list[tuple[float, float]]] = {languages: [] for languages in models}
        for pair in range(pairs + 2):
            batch = batch_of(pair, topology.rank, topology.dp, K)
            for languages in (list(models), list(models)[::-1])[pair % 2]:
                seconds = timed(models[languages], batch, CODES[:languages])
                if pair >= 2:  # the first ones record what will be gathered
                    times[languages].append(seconds)
        moved: dict[int, dict[int, int]] = {}
        for present in (1, 2, K):
            moved[present] = {}
            for languages, sharded in models.items():
                before = gathered
                timed(sharded, batch_of(100, topology.rank, topology.dp, present), CODES[:languages])
                moved[present][languages] = gathered - before
        if topology.is_main:
            (folder / "found.json").write_text(json.dumps({"times": times, "moved": moved}))
        for sharded in models.values():
            sharded.engine.destroy()


def main(folder: Path, pairs: int) -> None:
    """The launch and the table."""
    folder.mkdir(parents=True, exist_ok=True)
    run(2, [str(ROOT / "tests" / "benchmarks" / "xmod.py"), "--rank", str(folder), str(pairs)], folder / "log", 3000)
    found = json.loads((folder / "found.json").read_text())
    few, many = found["times"][str(FEW)], found["times"][str(len(CODES))]
    ratios = [sum(b) / sum(a) for a, b in zip(few, many, strict=True)]
    for name, of in ((f"{FEW} registered", few), (f"{len(CODES)} registered", many)):
        forward, step = median(t[0] for t in of), median(t[1] for t in of)
        print(f"{name:14}  forward and backward {forward:.3f} s, step {step:.3f} s")
    print(f"ratio {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}) over {len(ratios)} pairs; bar {BAR}")
    for present, of in found["moved"].items():
        a, b = of[str(FEW)] / 2**20, of[str(len(CODES))] / 2**20
        print(f"K = {present}: {a:.1f} MiB gathered in a micro-step with {FEW} registered, {b:.1f} with {len(CODES)}")
    print(json.dumps({"ratio": [min(ratios), median(ratios), max(ratios)], "moved": found["moved"]}))


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        torch.set_num_threads(1)
        measure(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), int((*sys.argv, "12")[2]))
