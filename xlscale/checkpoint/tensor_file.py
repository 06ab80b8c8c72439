"""A safetensors file, written tensor by tensor and piece by piece, so that no more than a piece is in memory."""

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from xlscale.checkpoint.hub_names import Shapes
from xlscale.checkpoint.weights import CHUNK, check_finite, safetensors_head

# xlscale's name -> (torch's, safetensors', config.json's)
DTYPES = {
    "fp32": (torch.float32, "F32", "float32"),
    "bf16": (torch.bfloat16, "BF16", "bfloat16"),
    "fp16": (torch.float16, "F16", "float16"),
}
# Metadata of every file of ours: transformers asks for the first, the second says whose file it is.
WRITER = {"format": "pt", "writer": "xlscale"}

Pieces = Callable[[str], Iterable[Tensor]]
"""Our name -> the rows of that parameter, in order, in as many pieces as one likes."""


def write_tensors(
    path: Path, shapes: Shapes, names: dict[str, str], pieces: Pieces, dtype: str, metadata: dict[str, str]
) -> None:
    """Write and flush one file; ValueError for a tensor of another shape than in `shapes`, or one that is not finite.

    names: our name -> that in the file. dtype: a key of DTYPES. Memory: the largest of the pieces.
    """
    target, code, _ = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for name, shape in shapes.items():
        end = offset + math.prod(shape) * target.itemsize
        header[names[name]] = {"dtype": code, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as file:
        file.write(safetensors_head(header))
        for name, shape in shapes.items():
            # No name holds the tensor here, so it is freed before the next one is read.
            _write_tensor(file, name, shape, pieces(name), target)
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(
    file: BinaryIO, name: str, shape: tuple[int, ...], pieces: Iterable[Tensor], target: torch.dtype
) -> None:
    rows = 0
    for rows_of_it in pieces:
        rows += len(rows_of_it)
        if rows > shape[0] or rows_of_it.shape[1:] != shape[1:]:
            raise _wrong_shape(name, (rows, *rows_of_it.shape[1:]), shape)
        flat = rows_of_it.detach().reshape(-1)
        for start in range(0, flat.numel(), CHUNK):
            piece = flat[start : start + CHUNK].to(device="cpu", dtype=target).contiguous()
            check_finite(name, piece)
            file.write(piece.view(torch.uint8).numpy().data)
    if rows != shape[0]:
        raise _wrong_shape(name, (rows, *shape[1:]), shape)


def _wrong_shape(name: str, found: tuple[int, ...], shape: tuple[int, ...]) -> ValueError:
    return ValueError(f"{name} has shape {found}, not {shape}; use the config that it was trained with")
