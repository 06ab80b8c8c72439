"""Run by each rank of a launch: the self-check on sound and on broken parallelism, and drifted() on a nudged rank.

Argument: a folder. Each rank leaves checks-<rank>.json there: by case what the self-check said (empty: nothing is
wrong), how long it took and what it left behind, and by ZeRO stage what drifted() named.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine

from xlscale.config import ConfigError
from xlscale.config_sections import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    TrainingConfig,
)
from xlscale.models.init import initial_rows
from xlscale.parallel import self_check as checked
from xlscale.parallel import tensor_parallel, zero
from xlscale.parallel.drift import drifted
from xlscale.parallel.self_check import self_check
from xlscale.parallel.sharded import KINDS
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw

TENSOR_PARALLEL = 2
NUDGED = "encoder.layers.1.mlp_norm.bias"
UNCOUNTED = "encoder.layers.0.mlp.up.weight"
XL = ModelConfig(
    model_type="xlm-roberta-xl",
    vocab_size=250880,
    hidden_size=2560,
    num_hidden_layers=36,
    num_attention_heads=32,
    intermediate_size=10240,
)
XMOD = replace(XL, model_type="xmod", languages=["en_XX", "de_DE", "sw_KE"])
MODELS = {
    "xl": XL,
    "post-odd-vocabulary": replace(XL, model_type="xlm-roberta", vocab_size=250001),
    "xmod": XMOD,
    "xmod-prenorm": replace(XMOD, pre_norm=True, adapter_layer_norm=True, ln_before_adapter=False),
    "decoder": replace(XL, is_decoder=True, position_embedding_type="relative_key_query", hidden_act="gelu_new"),
}


def config_for(model: ModelConfig, zero_stage: int = 3, sequence_parallel: bool = False, **training: Any) -> Config:
    """A run's config, of which the self-check makes its own."""
    return Config(
        training=TrainingConfig(
            **{"total_steps": 10, "global_batch_size": 64, "micro_batch_size": 4, "max_grad_norm": 1.0, **training}
        ),
        parallel=ParallelConfig(
            tensor_parallel=TENSOR_PARALLEL, zero_stage=zero_stage, sequence_parallel=sequence_parallel
        ),
        model=model,
        data=DataConfig(shards="-", tokenizer="-"),
        optimizer=OptimizerConfig(learning_rate=1e-4),
        schedule=ScheduleConfig(warmup_steps=0),
    )


SOUND = {
    **{name: config_for(model) for name, model in MODELS.items()},
    "xl-zero1-sp-ckpt": config_for(XL, 1, True, activation_checkpointing=1),
    "xmod-zero3-sp-ckpt": config_for(XMOD, 3, True, activation_checkpointing=6),
    "xl-zero0-unclipped": config_for(XL, 0, max_grad_norm=0.0),
}


@contextmanager
def norm_attribute_dropped() -> Iterator[None]:
    """One split parameter is taken for a replicated one, and no other guard looks."""
    real = tensor_parallel.prepare_parameters

    def dropped(model: torch.nn.Module, *arguments: Any) -> None:
        real(model, *arguments)
        dict(model.named_parameters())[UNCOUNTED].tensor_model_parallel = False

    with patch.object(zero, "prepare_parameters", dropped), patch.object(zero, "check_parameters"):
        yield


@contextmanager
def group_dropped() -> Iterator[None]:
    """zero.Init partitions over the whole world, so that a rank's partition is of another rank's slice."""
    real = deepspeed.zero.Init

    def without(*, data_parallel_group: Any, **rest: Any) -> Any:
        return real(**rest)

    with patch.object(deepspeed.zero, "Init", without), patch.object(zero, "check_parameters"):
        yield


@contextmanager
def column_input_not_summed() -> Iterator[None]:
    """The gradient of what enters a column-parallel layer stays that of this rank's columns."""
    with patch.object(tensor_parallel, "copy_to_model_parallel_region", lambda x: x):
        yield


@contextmanager
def tokens_not_summed() -> Iterator[None]:
    """Under sequence parallelism a norm's gradient stays that of this rank's tokens."""
    real = tensor_parallel.prepare_parameters
    with patch.object(zero, "prepare_parameters", lambda model, topology, _: real(model, topology, False)):
        yield


BROKEN: dict[str, tuple[Callable[[], Any], Config]] = {
    "norm attribute": (norm_attribute_dropped, config_for(XL)),
    "partition group": (group_dropped, config_for(XL)),
    "column input": (column_input_not_summed, config_for(XL)),
    "tokens": (tokens_not_summed, config_for(XL, sequence_parallel=True)),
}


def result_of(config: Config, topology: Topology) -> dict[str, Any]:
    before, started, said = torch.get_rng_state(), time.perf_counter(), ""
    try:
        self_check(config, topology, adamw)
    except ConfigError as error:
        said = str(error)
    seconds = time.perf_counter() - started
    gc.collect()
    return {
        "said": said,
        "seconds": seconds,
        "random_state_kept": torch.equal(before, torch.get_rng_state()),
        "engines_left": sum(isinstance(thing, DeepSpeedEngine) for thing in gc.get_objects()),
    }


def drift_named(stage: int, topology: Topology) -> dict[str, list[str]]:
    """What drifted() names before, and after one tensor-parallel rank's LayerNorm has got one wrong bit."""
    config = checked.tiny(config_for(XL, stage), topology)
    sharded = build(config, topology, adamw)
    shapes = sharded.full_shapes()
    sharded.load(lambda _, name, start, stop: initial_rows(name, shapes[name], config.model, 1, start, stop))
    found = {"untouched": drifted(sharded)}
    parameter = dict(sharded.named_parameters())[NUDGED]
    sharded.make_optimizer_state({"": 1})
    found["with moments"] = drifted(sharded)
    for kind in KINDS:
        values = sharded.read(parameter, kind).clone()
        whole = values.clone()
        # The last element of the last partition that has any; all ranks write, one of them something else.
        if topology.tp_rank == 1 and topology.dp_rank == 1:
            whole.view(torch.int32)[-1] ^= 1
        with sharded.writing():
            sharded.write(parameter, kind, whole)
        found[kind] = drifted(sharded)
        with sharded.writing():
            sharded.write(parameter, kind, values)
    found["mended"] = drifted(sharded)
    sharded.engine.destroy()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_groups(TENSOR_PARALLEL) as topology:
        findings: dict[str, Any] = {"cwd": sorted(map(str, Path.cwd().iterdir()))}
        findings["sound"] = {name: result_of(config, topology) for name, config in SOUND.items()}
        findings["drift"] = {stage: drift_named(stage, topology) for stage in (0, 1, 3)}
        findings["broken"] = {}
        for name, (broken, config) in BROKEN.items():
            with broken():
                findings["broken"][name] = result_of(config, topology)
            print(name, findings["broken"][name], flush=True)
        findings["new files"] = sorted({*map(str, Path.cwd().iterdir())} - {*findings.pop("cwd")})
        (Path(sys.argv[1]) / f"checks-{topology.rank}.json").write_text(json.dumps(findings))
