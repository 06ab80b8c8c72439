"""The memory that a save copies its state into."""

from pathlib import Path

import pytest
import torch

from xlscale.checkpoint import host_buffer
from xlscale.checkpoint.host_buffer import HostBuffer
from xlscale.checkpoint.partition_file import PartitionFile
from xlscale.parallel.sharded import KINDS


@pytest.mark.parametrize("block", [1, 3, 7, 64, 1000])
def test_a_file_of_blocks_has_the_bytes_of_one_written_tensor_by_tensor(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors that end within blocks, at their ends, and go over several; and empty ones."""
    monkeypatch.setattr(host_buffer, "BLOCK", block)
    sizes = {"a": 7, "b": 0, "c": 14, "d": 1, "e": 200, "f": 0}
    ranges = {name: (5, 5 + size) for name, size in sizes.items()}
    tensors = {kind: {name: torch.randn(size) for name, size in sizes.items()} for kind in KINDS}
    buffers = {kind: HostBuffer(sum(sizes.values()), locked=False) for kind in KINDS}
    for _ in range(2):  # it is used again
        start = 0
        for name, size in sizes.items():
            for kind in KINDS:
                buffers[kind].put(start, tensors[kind][name])
            start += size
    whole, blocks = (PartitionFile(tmp_path / name, ranges) for name in ("whole", "blocks"))
    for kind in KINDS:
        for tensor in tensors[kind].values():
            whole.write(tensor)
        for piece in buffers[kind].blocks:
            blocks.write(piece)
    assert whole.close() == blocks.close()
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "blocks").read_bytes()


def test_what_is_copied_does_not_change_with_its_source() -> None:
    buffer, source = HostBuffer(4, locked=False), torch.arange(4.0)
    buffer.put(0, source)
    source.mul_(2)
    assert buffer.blocks[0].tolist() == [0, 1, 2, 3]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_fills_locked_memory_while_it_goes_on_and_what_it_computes_next_is_not_in_it() -> None:
    size = 3 * host_buffer.BLOCK // 2
    buffer, source = HostBuffer(size, locked=True), torch.arange(size, dtype=torch.float32, device="cuda")
    assert all(block.is_pinned() for block in buffer.blocks)
    buffer.put(0, source * 1)  # a tensor that is gone before it is copied
    source.mul_(2)
    torch.cuda.current_stream().synchronize()
    assert torch.equal(torch.cat(buffer.blocks), torch.arange(size, dtype=torch.float32))
