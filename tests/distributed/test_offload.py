"""Optimizer state on the CPU or on a disk, and the tuning keys of [deepspeed], change nothing that is trained."""

import ctypes.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import BATCH, ConfigFor
from tests.distributed.launch import ROOT, run
from xlscale.checkpoint.store import KINDS, Checkpoint
from xlscale.training.metrics import read_events, read_metrics

STEPS, HALF = 6, 3
WORKER = str(ROOT / "tests" / "distributed" / "offload_cases.py")
BRIEF = {"training.total_steps": STEPS, "training.micro_batch_size": BATCH // 4, "checkpoint.every": HALF}
# The engine keeps on a disk only what is 1 MiB or more: groups of 262144 weights on each of two ranks.
LARGE = {"model.hidden_size": 192, "model.intermediate_size": 768, "model.num_hidden_layers": 3}
GROUPS = {"zero_optimization": {"sub_group_size": 300_000}}
STAGES = (1, 2)
"""Besides 3."""
TUNED: dict[str, Any] = {
    "zero_optimization": {
        "contiguous_gradients": False,
        "reduce_scatter": False,
        "reduce_bucket_size": 100_000,
        "use_multi_rank_bucket_allreduce": False,
        "allgather_partitions": False,
        "allgather_bucket_size": 5e4,
        "overlap_comm": True,
        "sub_group_size": 200_000,
        "stage3_prefetch_bucket_size": 50_000,
        "stage3_param_persistence_threshold": 1000,
        "stage3_model_persistence_threshold": 10_000,
        "stage3_max_live_parameters": 500_000,
        "stage3_max_reuse_distance": 100_000,
        "stage3_module_granularity_threshold": 100,
        "stage3_use_all_reduce_for_fetch_params": True,
        "stage3_allgather_sequential": True,
        "ignore_unused_parameters": False,
        "parameter_alignment": True,
        "memory_efficient_linear": False,
        "log_trace_cache_warnings": True,
        "enable_sanity_checks": True,
    },
    "comms_logger": {"enabled": True, "prof_ops": ["all_gather"]},
    "flops_profiler": {"enabled": True, "profile_step": 2, "detailed": False},
    "timers": {"throughput": {"enabled": False}},
    "steps_per_print": 2,
    "wall_clock_breakdown": True,
    "dump_state": True,
    "disable_python_gc": True,
}


def without_async_io() -> str:
    """Why the op that reads and writes the disk cannot be built here; "" where it can."""
    if not shutil.which("g++"):
        return "no g++"
    header = any((Path(folder) / "libaio.h").exists() for folder in ("/usr/include", "/usr/local/include"))
    return "" if header and ctypes.util.find_library("aio") else "no libaio-dev"


def engine_keys(tuning: dict[str, Any]) -> dict[str, Any]:
    """What a config says to hand `tuning` to the engine."""
    return {f"deepspeed.{key}": value for key, value in tuning.items()}


def offload(where: str, disk: Path) -> dict[str, Any]:
    """What a config says to offload to `where`."""
    if where != "nvme":
        return {"parallel.offload_optimizer": where}
    return {"parallel.offload_optimizer": where, "parallel.offload_folder": str(disk), **engine_keys(GROUPS)}


def train_all(root: Path, tiny_config: ConfigFor, parts: list[tuple[str, dict[str, Any]]], timeout: float) -> Path:
    """Six updates of every name on two ranks in one launch; a name given twice stops half-way and goes on otherwise."""
    paths = []
    for number, (name, changes) in enumerate(parts):
        more = any(later == name for later, _ in parts[number + 1 :])
        folder = root / str(number)
        folder.mkdir()
        where = {"run.dir": str(root), "data.cache": str(root / "tokens"), "training.stop_after": HALF if more else 0}
        paths.append(tiny_config(folder, name, BRIEF | changes | where))
    run(2, [WORKER, *map(str, paths)], root / "log", timeout)
    return root


@pytest.fixture(scope="module")
def runs(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    cpu = offload("cpu", root)
    parts: list[tuple[str, dict[str, Any]]] = [("none", {}), ("none-cpu", {}), ("none-cpu", cpu), ("cpu-none", cpu)]
    parts += [("cpu-none", {}), ("tuned", engine_keys(TUNED))]
    for stage in STAGES:
        at_stage = {"parallel.zero_stage": stage}
        parts += [(f"cpu-stage{stage}", cpu | at_stage), (f"tuned-stage{stage}", engine_keys(TUNED) | at_stage)]
    return train_all(root, tiny_config, parts, 240)


def same_run(run_dir: Path, expected: Path) -> None:
    """Losses, norms, weights and moments of two runs agree, and clipping was tried."""
    curves = [[(r["loss"], r["grad_norm"]) for r in read_metrics(folder)] for folder in (run_dir, expected)]
    assert len(curves[1]) == STEPS and min(norm for _, norm in curves[1]) > 0.5
    assert [each for pair in curves[0] for each in pair] == pytest.approx(
        [each for pair in curves[1] for each in pair], rel=1e-5
    )
    states = [Checkpoint.open(folder / "checkpoints" / f"step-{STEPS:08d}") for folder in (run_dir, expected)]
    assert [state.manifest["optimizer_steps"] for state in states] == [STEPS, STEPS]
    for parameter in states[0].manifest["parameters"]:
        if parameter.endswith("attention.key.bias"):
            continue  # its true gradient is zero: Adam makes updates of the rounding noise
        for kind in KINDS:
            got, plain = (state.full(parameter, kind) for state in states)
            assert (got - plain).norm() <= 1e-5 * plain.norm() + 1e-9, (parameter, kind)


@pytest.mark.parametrize("name", ["none-cpu", "cpu-none", *(f"cpu-stage{stage}" for stage in STAGES)])
def test_the_optimizer_on_the_cpu_trains_the_same(name: str, runs: Path) -> None:
    same_run(runs / name, runs / "none")


@pytest.mark.parametrize("name", ["tuned", *(f"tuned-stage{stage}" for stage in STAGES)])
def test_what_deepspeed_may_be_told_changes_nothing_that_is_trained(name: str, runs: Path) -> None:
    same_run(runs / name, runs / "none")
    told = json.loads((runs / name / "deepspeed.json").read_text())
    assert all(told["zero_optimization"][key] == value for key, value in TUNED["zero_optimization"].items())


def test_what_changed_between_two_starts_is_said(runs: Path) -> None:
    (resumed,) = [event for event in read_events(runs / "cpu-none") if event["event"] == "resume"]
    assert "parallel.offload_optimizer was 'cpu' and is 'none'" in resumed["changed"]


# The op is compiled once into TORCH_EXTENSIONS_DIR; that takes minutes.
@pytest.mark.slow
@pytest.mark.skipif(bool(without_async_io()), reason=f"async_io cannot be built: {without_async_io()}")
def test_the_optimizer_on_a_disk_trains_the_same_and_goes_on_with_and_without(
    tiny_config: ConfigFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = tmp_path / "disk"
    nvme, cpu = (LARGE | offload(where, disk) for where in ("nvme", "cpu"))
    extensions = Path(os.environ.get("TORCH_EXTENSIONS_DIR", ROOT / ".cache" / "torch_extensions"))
    (extensions / "async_io").mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    (extensions / "async_io" / "lock").touch()  # as a killed build leaves it
    parts = [("none", LARGE), ("nvme", nvme), ("nvme-none", nvme), ("nvme-none", LARGE), ("cpu-nvme", cpu)]
    train_all(tmp_path, tiny_config, [*parts, ("cpu-nvme", nvme)], 900)
    for name in ("nvme", "nvme-none", "cpu-nvme"):
        same_run(tmp_path / name, tmp_path / "none")
    for rank in range(2):
        files = json.loads((tmp_path / "nvme" / f"swapped-{rank}.json").read_text())
        state = [name for name in files if "gradient" not in name]
        # The weight and both moments of each group; the small ones, biases and norms, stay in memory.
        assert len(state) >= 6 and len(state) % 3 == 0
        assert sum(files[name] for name in state) >= 0.9 * 12 * 1_200_000 / 2
    assert not list(disk.rglob("*.swp"))
    for events in (read_events(tmp_path / "nvme-none"), read_events(tmp_path / "cpu-nvme")):
        (resumed,) = [event for event in events if event["event"] == "resume"]
        assert any("parallel.offload_optimizer was" in change for change in resumed["changed"])
        assert any("deepspeed.zero_optimization.sub_group_size was" in change for change in resumed["changed"])
