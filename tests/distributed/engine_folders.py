"""Folders of the engine's own checkpoints, as tests copy and spoil them."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from xlscale.checkpoint.store import Checkpoint
from xlscale.parallel.sharded import KINDS

UPDATES, BATCH = 3, 8
MODEL = {"model.vocab_size": 641, "model.intermediate_size": 66}
"""A vocabulary that two ranks cannot halve, and in the midst of the layers biases that four cannot share equally."""
NAME, TAG = f"step-{UPDATES:08d}", f"global_step{UPDATES}"
WORD, NORM = "encoder.embeddings.word.weight", "encoder.final_norm.weight"
CASES = {
    "1-fp32": (1, "fp32", 2),
    "2-fp32": (2, "fp32", 2),
    "3-fp32": (3, "fp32", 2),
    "1-bf16": (1, "bf16", 2),
    "3-bf16": (3, "bf16", 2),
    "3-fp32-tp1": (3, "fp32", 1),
}
"""name -> (ZeRO stage, precision, tensor-parallel size), on four ranks"""


def ours(root: Path, case: str) -> Path:
    """Our checkpoint of a case of engine_file_cases.py."""
    return root / "ours" / case / NAME


def copy(root: Path, case: str, folder: Path) -> Path:
    """The engine's checkpoint of a case, for its files to be changed."""
    return Path(shutil.copytree(root / "engine" / case / TAG, folder / TAG))


def optim(tp_rank: int, dp_rank: int, precision: str = "") -> str:
    return f"{precision}zero_pp_rank_{dp_rank}_mp_rank_{tp_rank:02d}_optim_states.pt"


def model(tp_rank: int, dp_rank: int | None = None) -> str:
    return f"zero_pp_rank_{dp_rank}_" * (dp_rank is not None) + f"mp_rank_{tp_rank:02d}_model_states.pt"


def change(path: Path, work: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=False)
    work(content)
    torch.save(content, path)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def rename(folder: Path, names: dict[str, str]) -> None:
    """Give the parameters in a grid's files other names, as another model under the engine has them."""
    for path in folder.glob("*_states.pt"):
        content = torch.load(path, weights_only=False)
        if "param_shapes" in content:
            content["param_shapes"] = [
                {names.get(n, n): shape for n, shape in group.items()} for group in content["param_shapes"]
            ]
        else:
            state = content["optimizer_state_dict"]
            if mappings := state.get("param_slice_mappings"):
                state["param_slice_mappings"] = [
                    {names.get(n, n): address for n, address in group.items()} for group in mappings
                ]
        torch.save(content, path)


def assert_same(found: Path, wanted: Path) -> None:
    """Every weight, moment and count of two checkpoints of ours."""
    one, other = Checkpoint.open(found), Checkpoint.open(wanted)
    for key in ("step", "slot", "optimizer_steps", "format"):
        assert one.manifest[key] == other.manifest[key], key
    shapes = [
        [(name, entry["shape"], entry["split_dim"]) for name, entry in each.manifest["parameters"].items()]
        for each in (one, other)
    ]
    assert shapes[0] == shapes[1] and one.state("stream") == other.state("stream")
    for name in other.manifest["parameters"]:
        for kind in KINDS:
            assert torch.equal(one.full(name, kind), other.full(name, kind)), (kind, name)
