"""What goes on beside the partitions, a small file for each part of a run: JSON, or safetensors where it is tensors."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def write_state(folder: Path, name: str, state: dict[str, Any]) -> None:
    """<name>.safetensors where the values are tensors, else <name>.json."""
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"{name}.safetensors")
    else:
        (folder / f"{name}.json").write_text(json.dumps(state, indent=1), encoding="utf-8")


def read_state(folder: Path, name: str, files: Container[str]) -> dict[str, Any]:
    """What write_state wrote; empty when `files`, those of the checkpoint, has neither."""
    if f"{name}.safetensors" in files:
        return load_file(folder / f"{name}.safetensors")
    if f"{name}.json" not in files:
        return {}
    state: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return state
