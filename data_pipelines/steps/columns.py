"""Columns: facts of a language's documents as raw files, one after the other by place, mapped and never on the heap."""

import contextlib
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 1 << 16  # of a column, copied together


def column(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    """An array of zeros in a new file: the kernel writes it out and drops it from memory as it needs to.

    Takes its room on the disk at once: where that is missing, an OSError, no death at a later write.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    with path.open("w+b") as file:
        if not size:
            return np.zeros(shape, dtype)
        os.posix_fallocate(file.fileno(), 0, size)
        # Not np.memmap: it looks up each folder of the path, and slicing one costs several microseconds.
        return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)


def mapped(path: Path, dtype: Any, width: int = 0) -> np.ndarray:
    """A column that stands in a file, read only; `width`: values of each place, 0 = one."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return np.zeros((0, width) if width else (0,), dtype)
        values = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype)
    return values.reshape(-1, width) if width else values


class Parts:
    """A column in several files as one array of which single places are read."""

    def __init__(self, arrays: Sequence[np.ndarray]):
        self.arrays = arrays
        self.starts = np.cumsum([0, *map(len, arrays)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, places: Any) -> np.ndarray:
        """The rows at an array of places, or the row at one."""
        if np.ndim(places) == 0:
            part = int(np.searchsorted(self.starts, places, side="right")) - 1
            row: np.ndarray = self.arrays[part][places - self.starts[part]]
            return row
        parts = np.searchsorted(self.starts, places, side="right") - 1
        rows = np.empty((len(places), *self.arrays[0].shape[1:]), self.arrays[0].dtype)
        for part in np.unique(parts):
            mine = parts == part
            rows[mine] = self.arrays[part][places[mine] - self.starts[part]]
        return rows

    def whole(self, path: Path) -> np.ndarray:
        """All of it in one file, a new one if it is in several."""
        if len(self.arrays) == 1:
            return self.arrays[0]
        whole = column(path, self.arrays[0].dtype, (len(self), *self.arrays[0].shape[1:]))
        for start, array in zip(self.starts, self.arrays, strict=False):
            for begin in range(0, len(array), ROWS):
                block = array[begin : begin + ROWS]
                whole[start + begin : start + begin + len(block)] = block
        return whole


@contextlib.contextmanager
def scratch(parent: Path | None, name: str) -> Iterator[Path]:
    """An empty folder, gone at the end; what a run that was killed has left there is taken away first."""
    if parent is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path = parent / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
