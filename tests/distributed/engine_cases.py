"""Run by each rank of a launch: dp 2 x tp 2 under every ZeRO stage, against the whole model on one process.

What is tried is what the backward pass finds: gathered weights released or not, layers computed again or not.
"""

from itertools import product
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.distributed.encoder_cases import APART, CASES, DOCUMENTS, arguments, assert_close, whole
from tests.packed import batch_of, loss_alone
from xlscale.config_sections import (
    Config,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.models.heads import MaskedLM
from xlscale.parallel.sharded import ShardedModel
from xlscale.parallel.tensor_parallel import tensor_slice
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.faulty_update import join, rows_of
from xlscale.training.update import forward_and_backward

ACCUMULATION, UPDATES = 2, 2
"""The engine learns in the first passes in which order weights are needed, and fetches ahead in the later ones."""


def sharded_of(
    topology: Topology, reference: MaskedLM, stage: int, sequence_parallel: bool, recomputed: int
) -> ShardedModel:
    config = Config(
        training=TrainingConfig(
            total_steps=1,
            global_batch_size=ACCUMULATION * topology.dp,
            micro_batch_size=1,
            precision="fp32",
            activation_checkpointing=recomputed,
        ),
        parallel=ParallelConfig(
            tensor_parallel=topology.tp, zero_stage=stage, sequence_parallel=sequence_parallel, self_check=False
        ),
        model=reference.config,
        data=DataConfig(shards="-", tokenizer="-"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_steps=0),
        # No parameter is so small that it stays gathered.
        deepspeed={
            "zero_optimization": {
                "stage3_param_persistence_threshold": 0,
                "stage3_max_reuse_distance": 0,
                "stage3_prefetch_bucket_size": 4096,
            }
        },
    )
    sharded = build(config, topology, lambda named, _: torch.optim.AdamW([p for _, p in named], lr=0.0))
    given = dict(reference.named_parameters())
    sharded.load(lambda _, name, start, stop: given[name].detach()[start:stop])
    return sharded


def watch(model: MaskedLM) -> dict[str, StorageWeakRef]:
    """Filled in every forward pass: the storage that each parameter had while its module computed."""
    seen: dict[str, StorageWeakRef] = {}

    def note(prefix: str) -> Any:
        def hook(module: torch.nn.Module, _: Any) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                assert parameter.numel(), "the engine gathers before this"
                seen[f"{prefix}.{name}"] = StorageWeakRef(parameter.untyped_storage())

        return hook

    for name, module in model.named_modules():
        module.register_forward_pre_hook(note(name))
    return seen


def check(topology: Topology, reference: MaskedLM, stage: int, sequence_parallel: bool, recomputed: int) -> None:
    sharded = sharded_of(topology, reference, stage, sequence_parallel, recomputed)
    engine = sharded.engine
    seen = watch(engine.module)
    parameters = dict(reference.named_parameters())
    for step in range(ACCUMULATION * UPDATES):
        given = arguments(reference.config)
        output = engine(given.pop("input_ids"), given.pop("labels"), given.pop("attention_mask"), **given)
        if stage == 3 and step == 0:  # later the engine keeps on purpose what it will soon need again
            assert len(seen) > 20
            kept = [name for name, storage in seen.items() if not storage.expired()]
            assert not kept, f"gathered and not released after the forward pass: {kept}"
        engine.backward(output.losses_M.mean(), scale_wrt_gas=False)
        if (step + 1) % ACCUMULATION == 0:
            check_gradients(sharded, parameters, ACCUMULATION)
        engine.step()
    engine.destroy()


def check_gradients(sharded: ShardedModel, parameters: dict[str, torch.nn.Parameter], times: int) -> None:
    topology = sharded.topology
    for name, parameter in sharded.named_parameters():
        wanted, found = parameters[name].grad, sharded.gradient(parameter)
        if wanted is None:
            assert found is None or not found.any(), name
        else:
            assert found is not None, name
            assert_close(name, found, times * tensor_slice(wanted, name, topology.tp_rank, topology.tp))


def check_packed(topology: Topology, reference: MaskedLM, stage: int, sequence_parallel: bool, recomputed: int) -> None:
    """An update on rows of documents that do not see each other is that of every document alone in one process."""
    sharded = sharded_of(topology, reference, stage, sequence_parallel, recomputed)
    wanted_M = loss_alone(reference, DOCUMENTS, APART.sequence_length - 1)
    update = join([batch_of(APART, DOCUMENTS)])
    for _ in range(UPDATES):
        batches = [rows_of(update, np.array([topology.dp_rank + i * topology.dp])) for i in range(ACCUMULATION)]
        passed = forward_and_backward(sharded, batches, ["en_XX"], seed=0, limit=None)
        assert abs(float(passed.loss) - float(wanted_M.mean())) < 1e-5
        check_gradients(sharded, dict(reference.named_parameters()), 1)
        sharded.engine.step()
    sharded.engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_groups(2) as topology:
        for name, stages in (("pre-LN", (0, 1, 2, 3)), ("xmod-base", (3,)), ("decoder", (3,))):
            reference = whole(CASES[name])
            # With 2, one of the two layers is computed again. Only what is not can keep a gathered weight.
            for stage, how in product(stages, ((False, 2), (True, 0), (True, 1))):
                check(topology, reference, stage, *how)
                print(name, stage, *how, "is the same", flush=True)
        reference = whole(CASES["post-LN"])
        for way in ((1, True, 1), (3, False, 0), (3, True, 1)):
            check_packed(topology, reference, *way)
            print("packed documents", *way, "is the same", flush=True)
