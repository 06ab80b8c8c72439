"""Memory of the host that a rank copies its state into, to be written while training goes on; made once and kept."""

import torch

BLOCK = 1 << 24
"""Elements in a piece, 64 MiB: locked memory is given out in powers of two, and one large piece could be half waste."""


class HostBuffer:
    """`size` fp32 numbers in blocks. `locked`: in pages that a GPU fills by itself; one must be there."""

    def __init__(self, size: int, locked: bool) -> None:
        sizes = [min(BLOCK, size - start) for start in range(0, size, BLOCK)]
        self.blocks = [torch.empty(each, dtype=torch.float32, pin_memory=locked) for each in sizes]

    def put(self, start: int, flat: torch.Tensor) -> None:
        """Copy `flat` to the elements from `start` on; what comes from a GPU is there once its stream is."""
        done = 0
        while done < len(flat):
            number, first = divmod(start + done, BLOCK)
            into = self.blocks[number][first : first + len(flat) - done]
            into.copy_(flat[done : done + len(into)], non_blocking=True)
            done += len(into)
