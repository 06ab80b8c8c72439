"""What goes on beside the partitions, a small file for each part of a run: JSON, or safetensors where it is tensors."""

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save


def encode_state(name: str, state: dict[str, Any]) -> tuple[str, bytes]:
    """Name and content of the file of a state: <name>.safetensors where the values are tensors, else <name>.json."""
    if state and all(isinstance(value, torch.Tensor) for value in state.values()):
        return f"{name}.safetensors", save({key: value.contiguous() for key, value in state.items()})
    return f"{name}.json", json.dumps(state, indent=1).encode()


def read_state(folder: Path, name: str, files: Container[str]) -> dict[str, Any]:
    """What encode_state made of a state; empty when `files`, those of the checkpoint, has neither."""
    if f"{name}.safetensors" in files:
        return load_file(folder / f"{name}.safetensors")
    if f"{name}.json" not in files:
        return {}
    state: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return state
