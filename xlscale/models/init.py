"""Initial weights as a pure function of (seed, parameter name, position): no rank, no order of drawing, no state."""

import hashlib

import numpy as np
import torch

from xlscale.config_sections import ModelConfig

BLOCK = 1 << 16
"""Normals drawn under one key; part of the format: another value gives other weights."""


def _normals(name: str, seed: int, start: int, stop: int) -> torch.Tensor:
    """Standard normals number `start` to `stop` of the endless sequence that belongs to (seed, name)."""
    key = int.from_bytes(hashlib.sha256(f"{seed} init {name}".encode()).digest()[:16], "little")
    first = start // BLOCK
    blocks = [
        np.random.Generator(np.random.Philox(key=key, counter=block << 64)).standard_normal(BLOCK, dtype=np.float32)
        for block in range(first, -(-stop // BLOCK))
    ]
    drawn = np.concatenate(blocks) if blocks else np.empty(0, np.float32)
    return torch.from_numpy(drawn[start - first * BLOCK : stop - first * BLOCK])


def initial_rows(
    name: str, shape: tuple[int, ...], model: ModelConfig, seed: int, start: int, stop: int
) -> torch.Tensor:
    """Rows `start` to `stop` (along dimension 0) of a parameter's full initial value, fp32.

    Weights are N(0, initializer_range), biases zero, norms (1, 0), the padding row and token types zero, as in RoBERTa.
    """
    rows = (stop - start, *shape[1:])
    is_norm = name.rsplit(".", 2)[-2].endswith("norm")
    if name.endswith(".bias"):
        return torch.zeros(rows)
    if is_norm:
        return torch.ones(rows)
    if name.endswith("token_type.weight") and model.type_vocab_size == 1:
        return torch.zeros(rows)
    width = int(np.prod(shape[1:], dtype=np.int64))
    values = _normals(name, seed, start * width, stop * width).reshape(rows) * model.initializer_range
    padding = model.pad_token_id
    if name.endswith(("word.weight", "position.weight")) and start <= padding < stop:
        values[padding - start] = 0.0
    return values


def init_weights(module: torch.nn.Module, model: ModelConfig, seed: int) -> None:
    """Give every parameter of an unsplit model its initial value, in place."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = tuple(parameter.shape)
            parameter.copy_(initial_rows(name, shape, model, seed, 0, shape[0]))
