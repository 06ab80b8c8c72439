"""For how long a checkpoint holds the training: written while it waits, and written behind it, in turns.

    python -m tests.benchmarks.saving FOLDER [PAIRS]

Two ranks train a model of 34M parameters (0.4 GB of weights and moments) at ZeRO-3 on a CPU. Each pair of saves, in an
order that changes from pair to pair, follows an update: one for which training waits, and one that is begun, updates
being done until all ranks have told that it is written, and then settled. Both flush all they write. Printed are
medians, and the extremes, over the pairs; the first of each kind is not counted (the copy's memory is made then, which
is told). FOLDER is on the disk that is measured, and is emptied again; it needs 2 GB.
"""

import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from tests.distributed.launch import ROOT, run
from xlscale.checkpoint.saver import Saver
from xlscale.config_sections import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.topology import process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw

MODEL = ModelConfig(
    model_type="xlm-roberta-xl", vocab_size=16_000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8,
    intermediate_size=2048, max_position_embeddings=66,
)  # fmt: skip
ROWS, TOKENS = 4, 64


def update(sharded: ShardedModel, number: int) -> float:
    """One update on random tokens; its seconds."""
    started = time.perf_counter()
    ids = torch.randint(5, MODEL.vocab_size, (ROWS, TOKENS), generator=torch.Generator().manual_seed(number))
    sharded.engine.backward(sharded.engine(ids, ids).losses_M.mean())
    sharded.engine.step()
    return time.perf_counter() - started


def held_at_once(saver: Saver, step: int) -> float:
    started = time.perf_counter()
    saver.begin(step, 0, {})
    assert saver.settle()
    return time.perf_counter() - started


def held_behind(saver: Saver, step: int, sharded: ShardedModel) -> dict[str, float]:
    started = time.perf_counter()
    saver.begin(step, 0, {})
    held = time.perf_counter() - started
    updates: list[float] = []
    writing = torch.ones(1)
    while writing.item():
        updates.append(update(sharded, step + len(updates)))
        writing[0] = float(saver.writing)
        dist.all_reduce(writing)
    started = time.perf_counter()
    saved = saver.settle()
    assert saved
    held += time.perf_counter() - started
    return {"held": held, "written": saved.seconds, "update": median(updates), "bytes": saved.bytes}


def measure(folder: Path, pairs: int) -> None:
    """What each rank does; the main one prints the figures as JSON."""
    torch.set_num_threads(1)
    tokenizer = folder / "tokenizer"
    with process_groups(1) as topology:
        config = Config(
            run=RunConfig(dir=str(folder), name="saving"),
            training=TrainingConfig(total_steps=1, global_batch_size=8, micro_batch_size=4, precision="fp32"),
            parallel=ParallelConfig(),
            model=MODEL,
            data=DataConfig(shards="-", tokenizer=str(tokenizer)),
            optimizer=OptimizerConfig(learning_rate=1e-4),
            schedule=ScheduleConfig(warmup_steps=0),
            checkpoint=CheckpointConfig(keep=1),
        )
        sharded = build(config, topology, adamw)
        shapes = sharded.full_shapes()
        sharded.load(lambda _, name, start, stop: initial_rows(name, shapes[name], MODEL, 1, start, stop))
        waits = replace(config, checkpoint=CheckpointConfig(keep=1, asynchronous=False))
        at_once = Saver(folder / "at-once", sharded, waits)
        behind = Saver(folder / "behind", sharded, config)
        step, alone, waited, others = 1, [], [], []
        for pair in range(pairs + 1):
            for turn in (pair, pair + 1):
                alone.append(update(sharded, step))
                if turn % 2:
                    waited.append(held_at_once(at_once, step))
                    at_once.finish()
                else:
                    others.append(held_behind(behind, step, sharded))
                    behind.finish()
                step += 1
        if topology.is_main:
            print(json.dumps({"at_once": waited, "behind": others, "alone": alone}))
        sharded.engine.destroy()


def spread(values: list[float], form: str = "{:.3f}") -> str:
    """Median, and the extremes."""
    return f"{form} ({form} to {form})".format(median(values), min(values), max(values))


def main(folder: Path, pairs: int) -> None:
    """Launch the ranks and print the table."""
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    try:
        arguments = [str(ROOT / "tests" / "benchmarks" / "saving.py"), "--rank", str(folder), str(pairs)]
        run(2, arguments, folder / "log", timeout=3600)
        found = json.loads((folder / "log.0").read_text().splitlines()[-1])
    finally:
        shutil.rmtree(folder)
    first, *others = found["behind"]
    waited, held = found["at_once"][1:], [other["held"] for other in others]
    print(f"{first['bytes'] / 1e9:.2f} GB written by two ranks, {pairs} pairs; median (least to most), seconds\n")
    print("| | held | written | an update meanwhile |\n|---|---|---|---|")
    print(f"| training waits | {spread(waited)} | the same | - |")
    written, updates = [o["written"] for o in others], [o["update"] for o in others]
    print(f"| written behind it | {spread(held)} | {spread(written)} | {spread(updates)} |")
    print(f"| first one behind it, its memory made | {first['held']:.3f} | {first['written']:.3f} | - |")
    print(f"| no save | - | - | {spread(found['alone'][2:])} |")
    ratios = [one / other for one, other in zip(waited, held, strict=True)]
    print(f"\nheld, training waits / written behind it, of each pair: {spread(ratios, '{:.1f}')}")


if __name__ == "__main__":
    if sys.argv[1] == "--rank":
        measure(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(Path(sys.argv[1]), int((*sys.argv, "15")[2]))
