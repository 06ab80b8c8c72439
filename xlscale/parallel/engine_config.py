"""The engine's JSON config, made from our dataclasses and the [deepspeed] table; the only place that knows its keys."""

from pathlib import Path
from typing import Any

from xlscale.config_deepspeed import overlaid
from xlscale.config_sections import Config
from xlscale.parallel.topology import Topology

SHOWN_BY_ITS_LOG = ("comms_logger", "dump_state", "memory_breakdown", "steps_per_print", "wall_clock_breakdown")
"""Keys whose outcome is lines of the engine's log, which we keep down to warnings."""


def deepspeed_config(config: Config, topology: Topology) -> dict[str, Any]:
    """The engine's JSON config; the only place that knows its key names."""
    training = config.training
    model = config.model
    # At stage 0 our own optimizer clips and keeps the bf16 copies (replicated_optimizer.py): to the engine it is fp32.
    ours = config.parallel.zero_stage == 0
    layer = 4 * model.hidden_size**2 + 2 * model.hidden_size * model.intermediate_size
    embedding = model.vocab_size * model.hidden_size
    made = {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config, topology),
        "gradient_clipping": 0.0 if ours else training.max_grad_norm,
        "bf16": {"enabled": training.precision == "bf16" and not ours},
        # A bf16 sum over many micro-steps would lose what each of them adds.
        "data_types": {"grad_accum_dtype": "fp32"},
        # So would one over many data-parallel ranks; the default is the model's own format.
        "communication_data_type": "fp32",
        # torch's fused AdamW updates on a CPU too; the engine would insist on its own, which is compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": config.parallel.zero_stage,
            "contiguous_gradients": True,
            "overlap_comm": topology.device.type == "cuda",
            "reduce_bucket_size": max(layer // topology.tp, 1 << 20),
            # The defaults hold less than one XL layer, or than XXL's embedding: gathers would stall.
            "stage3_prefetch_bucket_size": max(2 * layer // topology.tp, 1 << 20),
            "stage3_max_live_parameters": max(2 * embedding // topology.tp + 4 * layer, 1 << 20),
            **_offload(config, topology, layer),
        },
        "steps_per_print": 1 << 62,
        "wall_clock_breakdown": False,
    }
    if any(key in config.deepspeed for key in SHOWN_BY_ITS_LOG):
        made["log_level"] = "info"
    return overlaid(made, config.deepspeed)


def swap_folder(config: Config) -> Path:
    """Folder of one run's part of parallel.offload_folder; another run's would be the same files."""
    return Path(config.parallel.offload_folder) / "-".join(config.run_dir.resolve().parts[1:])


def _offload(config: Config, topology: Topology, layer: int) -> dict[str, Any]:
    """The keys of zero_optimization that parallel.offload_optimizer decides; `layer`: elements of one layer."""
    where = config.parallel.offload_optimizer
    if where == "none":
        return {}
    offload: dict[str, Any] = {"device": where, "pin_memory": topology.device.type == "cuda"}
    if where == "cpu":
        return {"offload_optimizer": offload}
    return {
        # The weight, the gradient and both moments of one group at a time.
        "offload_optimizer": offload | {"nvme_path": str(swap_folder(config)), "buffer_count": 4},
        # What is read and written at once. By default it would be a rank's whole share; what is below 1 MiB the engine
        # keeps in memory.
        "sub_group_size": max(layer // topology.world_size, 1 << 20),
    }


def accumulation_steps(config: Config, topology: Topology) -> int:
    """Micro-steps of one update."""
    return config.training.global_batch_size // (config.training.micro_batch_size * topology.dp)
