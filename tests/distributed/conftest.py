"""One grid of real runs, launched once for all tests of this folder."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.engine_folders import MODEL, TAG
from tests.distributed.fault_cases import CASES, REPLAYS, WINDOW
from tests.distributed.launch import ROOT, run
from xlscale.config_values import toml_value
from xlscale.data.shards import Corpus

STEPS = 20
GRID = {"dp1-tp1": (1, 1, 4), "dp2-tp1": (2, 1, 2), "dp1-tp2": (1, 2, 4), "dp2-tp2": (2, 2, 2)}
"""name -> (data-parallel, tensor-parallel, accumulation), as the issue asks."""
BATCH = 8
WORKER = str(ROOT / "tests" / "distributed" / "train_cases.py")
ENGINE_WORKER = str(ROOT / "tests" / "distributed" / "engine_file_cases.py")
CASE_WORKER = str(ROOT / "tests" / "distributed" / "fault_cases.py")

ConfigFor = Callable[..., Path]

BASE: dict[str, Any] = {
    "training.seed": 7,
    "training.total_steps": STEPS,
    "training.global_batch_size": BATCH,
    "training.precision": "fp32",
    "training.threads": 1,
    "training.max_grad_norm": 0.5,
    "parallel.self_check": False,  # test_self_check.py has it; here it would be a third of the time
    "model.model_type": "xlm-roberta-xl",
    "model.vocab_size": 640,
    "model.hidden_size": 32,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4,
    "model.intermediate_size": 64,
    "model.hidden_dropout_prob": 0.0,
    "model.attention_probs_dropout_prob": 0.0,
    "model.initializer_range": 0.1,
    "data.sequence_length": 32,
    "data.workers": 0,  # a process more for each rank takes longer to start than all of its batches
    "optimizer.learning_rate": 0.003,
    "schedule.warmup_steps": 5,
    "checkpoint.every": 10,
    "checkpoint.keep": 0,
    "logging.wandb": "disabled",
}


@pytest.fixture(scope="session")
def tiny_config(tiny_corpus: Corpus, tiny_tokenizer_folder: Path) -> ConfigFor:
    """(folder, name, changes) -> path of a config whose run folder is folder/name."""

    def write(folder: Path, name: str, changes: dict[str, Any]) -> Path:
        values = BASE | {
            "run.dir": str(folder),
            "run.name": name,
            "data.shards": str(tiny_corpus.folder),
            "data.tokenizer": str(tiny_tokenizer_folder),
            "data.cache": str(folder / "tokens"),
        }
        sections: dict[str, list[str]] = {}
        for key, value in (values | changes).items():
            section, field = key.split(".")
            sections.setdefault(section, []).append(f"{field} = {toml_value(value)}")
        path = folder / f"{name}.toml"
        path.write_text("\n".join(line for section, lines in sections.items() for line in (f"[{section}]", *lines)))
        return path

    return write


def shape_changes(name: str) -> dict[str, Any]:
    """What a config needs to run at one shape of the grid."""
    dp, tp, accumulation = GRID[name]
    return {"training.micro_batch_size": BATCH // (dp * accumulation), "parallel.tensor_parallel": tp}


@pytest.fixture(scope="session")
def grid(tmp_path_factory: pytest.TempPathFactory, tiny_config: ConfigFor) -> dict[str, Path]:
    """Run folders of 20 updates at each shape, of one shape with loader processes, and of a post-LN model with 641
    pieces, which two ranks cannot halve."""
    root = tmp_path_factory.mktemp("grid")
    configs: dict[int, list[Path]] = {1: [], 2: [], 4: []}
    for name, (dp, tp, _) in GRID.items():
        configs[dp * tp].append(tiny_config(root, name, shape_changes(name)))
    configs[2].append(tiny_config(root, "dp2-tp1-loader", shape_changes("dp2-tp1") | {"data.workers": 1}))
    post_norm = {"model.model_type": "xlm-roberta", "model.vocab_size": 641, "parallel.sequence_parallel": True}
    configs[2].append(tiny_config(root, "post-norm", shape_changes("dp1-tp2") | post_norm))
    for world_size, paths in configs.items():
        run(world_size, [WORKER, *map(str, paths)], root / f"world{world_size}.log", timeout=240)
    return {path.stem: root / path.stem for paths in configs.values() for path in paths}


@pytest.fixture(scope="session")
def runs(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the runs of fault_cases.CASES and of the replays, of two launches: two ranks, and dp2 x tp2."""
    root = tmp_path_factory.mktemp("faults")
    changes = {
        "parallel.self_check": False,
        "checkpoint.every": 1,
        "checkpoint.probe": False,  # the cases put faults into weights, which it would find at the start
        "model.hidden_dropout_prob": 0.1,
        "faults.spike_window": WINDOW,
    }
    tiny_config(root, "base", shape_changes("dp2-tp1") | changes)
    tensor_parallel = [name for name in CASES if name.endswith("-tp")]
    run(
        2,
        [CASE_WORKER, str(root), *(name for name in CASES if name not in tensor_parallel), *REPLAYS],
        root / "two.log",
        timeout=300,
    )
    run(4, [CASE_WORKER, str(root), *tensor_parallel], root / "four.log", timeout=300)
    return root


@pytest.fixture(scope="session")
def engine_saved(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What engine_file_cases.py leaves of one launch."""
    root = tmp_path_factory.mktemp("engine")
    tiny_config(root, "base", shape_changes("dp2-tp2") | MODEL)
    run(4, [ENGINE_WORKER, str(root)], root / "launch.log", timeout=300)
    return root


@pytest.fixture(scope="session")
def engine_universal(engine_saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """case -> the folder that deepspeed's ds_to_universal makes of it."""
    from deepspeed.checkpoint import ds_to_universal

    root = tmp_path_factory.mktemp("universal")

    def converted(case: str) -> Path:
        out = root / case / TAG
        if not out.exists():
            given = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
            folders = {"input_folder": str(engine_saved / "engine" / case / TAG), "output_folder": str(out)}
            ds_to_universal.main(Namespace(inject_missing_state=False, **folders, **given))
        return out

    return converted
