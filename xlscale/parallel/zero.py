"""DeepSpeed's side: a model under the engine at any ZeRO stage."""

import contextlib
import io
from typing import Any

import deepspeed
from fairscale.nn.model_parallel import initialize as mpu

from xlscale.config_sections import Config
from xlscale.models.bare import OnEncoder
from xlscale.models.dropout import DropoutKey
from xlscale.models.heads import MaskedLM
from xlscale.parallel.engine_config import deepspeed_config
from xlscale.parallel.guards import GuardedEngine, check_engine, check_parameters
from xlscale.parallel.offload import prepare_offload
from xlscale.parallel.partitioned import PartitionedModel
from xlscale.parallel.replicated import SharedStateModel, WholeStateModel
from xlscale.parallel.sharded import MakeOptimizer, ShardedModel
from xlscale.parallel.tensor_parallel import parallel_parts, prepare_parameters
from xlscale.parallel.topology import Topology

STAGES: dict[int, type[ShardedModel]] = {
    0: WholeStateModel,
    1: SharedStateModel,
    2: SharedStateModel,
    3: PartitionedModel,
}
"""ZeRO stage -> how the model is held; the checkpoints are the same whichever it is."""


def build(
    config: Config,
    topology: Topology,
    optimizer: MakeOptimizer,
    model_class: type[OnEncoder] = MaskedLM,
) -> ShardedModel:
    """A model, the masked LM if nothing is said, under the engine and tensor parallelism.

    At stage 3 no rank ever holds all of it. `optimizer(named_parameters, config.optimizer)` makes the optimizer. The
    weights are not initialised: call load(). Raises ValueError for what would train wrongly in silence.
    """
    check_engine(mpu)
    holding = STAGES[config.parallel.zero_stage]
    prepare_offload(config, topology)
    engine_config = deepspeed_config(config, topology)
    dropout_key = DropoutKey()
    parts = parallel_parts(
        topology, dropout_key, config.parallel.sequence_parallel, config.training.activation_checkpointing
    )
    with holding.construction(topology, engine_config):
        model = model_class(config.model, parts)
    prepare_parameters(model, topology, config.parallel.sequence_parallel)
    engine: Any
    with contextlib.redirect_stdout(io.StringIO()):  # at stage 1 in bf16 it prints 24 lines about memory
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=holding.optimizer(model, optimizer, config, topology),
            config=engine_config,
            mpu=mpu,
            dist_init_required=False,
        )
    check_parameters(engine, topology)
    sharded = holding(GuardedEngine.guard(engine), topology, dropout_key, engine_config)
    if config.model.languages:
        sharded.train_adapters(config.model.languages)
    engine.before_update, engine.after_update = sharded.before_update, sharded.after_update
    return sharded
