"""Run by each of 4 ranks: updates at tp 2 or 1, saved by the engine itself and by us at the same moment.

Arguments: a folder with base.toml. Of each case <folder>/engine/<case> is what engine.save_checkpoint wrote, and
<folder>/ours/<case> what we did. Then the engine loads what we make of ours, in its universal layout.
"""

import os
import sys
import types
from pathlib import Path

import torch
import torch.distributed as dist
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_INFO
from deepspeed.runtime.engine import DeepSpeedEngine
from fairscale.nn.model_parallel import initialize as mpu

from tests.distributed.engine_folders import BATCH, CASES, UPDATES, ours
from xlscale.checkpoint.saver import save
from xlscale.checkpoint.store import Checkpoint
from xlscale.checkpoint.to_universal import export_universal
from xlscale.config import load_config
from xlscale.config_sections import Config
from xlscale.data.stream import open_stream
from xlscale.models.init import initial_rows
from xlscale.parallel.sharded import KINDS, ShardedModel
from xlscale.parallel.topology import Topology, process_groups
from xlscale.parallel.universal import universal_checkpoint_info
from xlscale.parallel.zero import build
from xlscale.training.optimizer import adamw

LOADED = {"1-fp32": 2, "2-fp32": 2, "1-bf16": 2, "3-fp32": 1}
"""Cases that the engine itself loads again from our universal layout -> at which tensor-parallel size."""


def config_of(root: Path, case: str, tp: int) -> Config:
    stage, precision, _ = CASES[case]
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    micro = BATCH * tp // world_size
    return load_config(
        root / "base.toml",
        [
            f"parallel.zero_stage={stage}",
            f"training.precision={precision}",
            f"parallel.tensor_parallel={tp}",
            f"training.micro_batch_size={micro}",
        ],
    )


def backward(sharded: ShardedModel, update: int) -> float:
    """Forward and backward of an update over ids that are the same whatever the shape; this rank's loss."""
    generator = torch.Generator().manual_seed(update)
    ids, labels = torch.randint(5, 500, (2, BATCH, 16), generator=generator)
    mine = BATCH // sharded.topology.dp
    rows = slice(sharded.topology.dp_rank * mine, (sharded.topology.dp_rank + 1) * mine)
    loss = sharded.engine(ids[rows], labels[rows]).losses_M.mean()
    sharded.engine.backward(loss, scale_wrt_gas=False)
    return float(loss.detach())


def save_both(topology: Topology, root: Path, case: str) -> float:
    """The loss of the update after the checkpoints."""
    config = config_of(root, case, topology.tp)
    sharded = build(config, topology, adamw)
    shapes = sharded.full_shapes()
    sharded.load(lambda _, name, *rows: initial_rows(name, shapes[name], config.model, config.training.seed, *rows))
    for update in range(UPDATES):
        backward(sharded, update)
        sharded.engine.step()
    by_the_engine(sharded, root / "engine" / case)
    states = {}
    if topology.is_main:
        states = {"stream": open_stream(config).state_dict(UPDATES * BATCH) | {"changes": []}}
    save(root / "ours" / case, sharded, config, UPDATES, UPDATES * BATCH, states)
    loss = backward(sharded, UPDATES)
    sharded.engine.destroy()
    return loss


def by_the_engine(sharded: ShardedModel, folder: Path) -> None:
    """engine.save_checkpoint, past our guard, as a user of deepspeed would have called it."""
    engine, config = sharded.engine, sharded.engine.module.config
    names = [name for name, _ in sharded.named_parameters()]
    info = universal_checkpoint_info(names, config.vocab_size, sharded.topology.tp)
    setattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, info)
    guarded = type(engine)
    engine.__class__ = DeepSpeedEngine
    engine.save_checkpoint(str(folder))
    engine.__class__ = guarded


def load_universal(topology: Topology, root: Path, case: str, loss: float | None) -> None:
    """The engine's own load of what we export gives every rank what it had, to the bit."""
    folder, checkpoint = root / "universal" / f"{case}-tp{topology.tp}", Checkpoint.open(ours(root, case))
    if topology.is_main:
        export_universal(checkpoint.folder, folder, topology.tp)
    dist.barrier()
    sharded = build(config_of(root, case, topology.tp), topology, adamw)
    engine = sharded.engine
    engine._config.load_universal_checkpoint = True  # "checkpoint": {"load_universal": true}
    # fairscale's has the name of older Megatrons only.
    sizes = {"get_tensor_model_parallel_world_size": mpu.get_model_parallel_world_size}
    engine.optimizer.mpu = types.SimpleNamespace(**vars(mpu) | sizes)
    engine.__class__ = DeepSpeedEngine
    engine.load_checkpoint(str(folder))
    assert engine.global_steps == UPDATES and sharded.optimizer_steps == UPDATES, case
    for name, parameter in sharded.named_parameters():
        for kind in KINDS:
            wanted = sharded.partition_of(checkpoint.rows, kind, name, parameter)
            assert torch.equal(sharded.read(parameter, kind), wanted), (case, kind, name)
    decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
    # Under ZeRO-3 the engine gives all groups the first one's.
    assert decays == ([0.01, 0.01] if CASES[case][0] == 3 else [0.01, 0.0]), decays
    if loss is not None:
        assert backward(sharded, UPDATES) == loss, case
    engine.destroy()
    print(case, "is loaded at tp", topology.tp, flush=True)


def cannot_load(topology: Topology, root: Path, case: str) -> None:
    """Under ZeRO-3 at tp 2 the engine takes the whole tensor for this rank's slice, unless its own AutoTP made that."""
    sharded = build(config_of(root, case, topology.tp), topology, adamw)
    sharded.engine._config.load_universal_checkpoint = True
    sharded.engine.__class__ = DeepSpeedEngine
    try:
        sharded.engine.load_checkpoint(str(root / "universal" / "1-fp32-tp2"))
    except RuntimeError as error:
        print(case, "is not loaded at tp", topology.tp, "for", error, flush=True)
    sharded.engine.destroy()


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    losses: dict[str, float] = {}
    for size in (2, 1):
        with process_groups(size) as topology:
            losses |= {case: save_both(topology, root, case) for case in CASES if CASES[case][2] == size}
            for case, tp in LOADED.items():
                if tp == size:
                    load_universal(topology, root, case, losses[case] if tp == 2 else None)
            if size == 2:
                cannot_load(topology, root, "3-fp32")
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
