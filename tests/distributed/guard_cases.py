"""Run by each of the 4 ranks of a launch: the cases of every stage, then each guard of a dp2 x tp2 grid.

Arguments: a folder, then the tensor-parallel sizes of the stages' cases.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from fairscale.nn.model_parallel import initialize as mpu

from tests.distributed.stage_cases import SEQUENCES, config_of, through
from xlscale.models.dropout import DropoutKey
from xlscale.models.heads import MaskedLM
from xlscale.parallel.guards import check_parameters
from xlscale.parallel.tensor_parallel import parallel_parts, prepare_parameters
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw

METHODS = {
    "save_16bit_model": "xlscale export",
    "save_fp16_model": "xlscale export",
    "module_state_dict": "xlscale export",
    "_consolidated_16bit_state_dict": "xlscale export",
    "_zero3_consolidated_16bit_state_dict": "xlscale export",
    "save_checkpoint": "xlscale.checkpoint.saver.save",
    "load_checkpoint": "ShardedModel.load",
    "load_module_state_dict": "ShardedModel.load",
}
"""What is refused -> the way out that the message has to name."""


def refuses_the_engines_own_files(topology: Topology, folder: Path) -> None:
    for stage in (1, 3):
        engine = build(config_of(stage, "fp32", topology, 0.0, folder), topology, adamw).engine
        for method, instead in METHODS.items():
            with pytest.raises(ValueError, match=f"engine.{method} is refused.*{instead}"):
                getattr(engine, method)(str(folder / "engine"))
        engine.destroy()
    assert not (folder / "engine").exists()


def refuses_an_old_engine(topology: Topology, folder: Path) -> None:
    installed = deepspeed.__version__
    deepspeed.__version__ = "0.19.7"
    try:
        with pytest.raises(ValueError, match=r"deepspeed 0\.19\.7 applies .* install deepspeed>=0\.19\.8"):
            build(config_of(3, "fp32", topology, 0.0, folder), topology, adamw)
    finally:
        deepspeed.__version__ = installed


def refuses_an_mpu_that_drops_tensor_parallelism(topology: Topology, folder: Path) -> None:
    mpu.initialize_sequence_parallel = None
    try:
        with pytest.raises(ValueError, match=r"initialize\b.* has an attribute initialize_sequence_parallel"):
            build(config_of(3, "fp32", topology, 0.0, folder), topology, adamw)
    finally:
        del mpu.initialize_sequence_parallel


def engine_made_otherwise(topology: Topology, folder: Path, stage: int, with_mpu: Any, **init: Any) -> Any:
    """An engine over a model as build() makes it, but by the arguments given."""
    sharded = build(config_of(stage, "fp32", topology, 0.0, folder), topology, adamw)
    config = sharded.deepspeed_config
    sharded.engine.destroy()
    model_config = config_of(stage, "fp32", topology, 0.0, folder).model
    with deepspeed.zero.Init(config_dict_or_path=config, mpu=mpu, remote_device="cpu", enabled=stage == 3, **init):
        model = MaskedLM(model_config, parallel_parts(topology, DropoutKey()))
    prepare_parameters(model, topology, False)
    optimizer = torch.optim.AdamW(model.parameters())
    # By the number of ranks that this mpu takes for data-parallel.
    config = config | {"train_batch_size": SEQUENCES // topology.dp * with_mpu.get_data_parallel_world_size()}
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, config=config, mpu=with_mpu, dist_init_required=False
    )
    return engine


def names_a_parameter_partitioned_over_the_wrong_ranks(topology: Topology, folder: Path) -> None:
    """zero.Init without data_parallel_group: tensor-parallel ranks would share the partitions of one slice."""
    engine = engine_made_otherwise(topology, folder, 3, mpu)
    wanted = [topology.tp_rank, topology.tp_rank + 2]
    message = rf"word\.weight is partitioned over ranks \[0, 1, 2, 3\].* with \[{wanted[0]}, {wanted[1]}\]; pass data_"
    with pytest.raises(ValueError, match=message):
        check_parameters(engine, topology)
    engine.destroy()
    right = engine_made_otherwise(topology, folder, 3, mpu, data_parallel_group=topology.dp_group)
    check_parameters(right, topology)
    right.destroy()


def refuses_to_average_over_the_wrong_ranks(topology: Topology, folder: Path) -> None:
    wrong = {name: getattr(mpu, name) for name in dir(mpu) if name.startswith("get_")}
    wrong |= {"get_data_parallel_group": lambda: dist.group.WORLD, "get_data_parallel_world_size": lambda: 4}
    engine = engine_made_otherwise(topology, folder, 1, SimpleNamespace(**wrong))
    with pytest.raises(ValueError, match=r"averages gradients over ranks \[0, 1, 2, 3\].* hand .* the mpu"):
        check_parameters(engine, topology)
    engine.destroy()


def names_a_parameter_that_the_norm_would_count_wrongly(topology: Topology, folder: Path) -> None:
    for stage in (0, 1, 3):
        sharded = build(config_of(stage, "fp32", topology, 0.0, folder), topology, adamw)
        parameters = dict(sharded.named_parameters())
        for name, right in (("encoder.layers.1.mlp.up.bias", True), ("encoder.layers.1.mlp.down.bias", False)):
            parameters[name].tensor_model_parallel = not right
            message = f"{name}.tensor_model_parallel is {not right}, by TP_PLAN it is {right}"
            with pytest.raises(ValueError, match=message):
                check_parameters(sharded.engine, topology)
            parameters[name].tensor_model_parallel = right
        del parameters["encoder.embeddings.norm.weight"].tensor_model_parallel
        with pytest.raises(ValueError, match=r"embeddings\.norm\.weight\.tensor_model_parallel is None, .* False"):
            check_parameters(sharded.engine, topology)
        sharded.engine.destroy()


GUARDS = [
    refuses_the_engines_own_files,
    refuses_an_old_engine,
    refuses_an_mpu_that_drops_tensor_parallelism,
    names_a_parameter_partitioned_over_the_wrong_ranks,
    refuses_to_average_over_the_wrong_ranks,
    names_a_parameter_that_the_norm_would_count_wrongly,
]

if __name__ == "__main__":
    torch.set_num_threads(1)
    through(Path(sys.argv[1]), [int(size) for size in sys.argv[2:]])
    with process_groups(2) as topology:
        for guard in GUARDS:
            try:
                guard(topology, Path(sys.argv[1]))
                print(f"{guard.__name__}: yes", flush=True)
            except BaseException as error:  # the others are tried all the same: none of them leaves a rank waiting
                print(f"{guard.__name__}: no: {str(error)[:300]}", flush=True)
