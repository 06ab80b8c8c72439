"""A checkpoint's rows come back whole from any split, also of a vocabulary that the ranks do not divide."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from xlscale.checkpoint.partition_file import HEAD, PartitionFile, part_digest, partition_file
from xlscale.checkpoint.store import Checkpoint
from xlscale.parallel.sharded import KINDS, share

WIDTH = 3
WORD, BIAS, UP, DOWN, NORM = (
    "encoder.embeddings.word.weight",
    "head.decoder.bias",
    "encoder.layers.0.mlp.up.weight",
    "encoder.layers.0.mlp.down.weight",
    "encoder.final_norm.weight",
)


def test_shares_are_equal_but_for_the_last_and_cover_everything_once() -> None:
    assert [share(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert [share(5, rank, 4) for rank in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [share(8, rank, 2) for rank in range(2)] == [(0, 4), (4, 8)]


def written(folder: Path, full: dict[str, torch.Tensor], dims: dict[str, int | None], tp: int, dp: int) -> Checkpoint:
    """A checkpoint as the ranks of a dp x tp grid write it: no row past the vocabulary, shares of the rest."""
    for tp_rank in range(tp):
        slices = {}
        for name, tensor in full.items():
            dim = dims[name]
            first, last = share(tensor.shape[dim], tp_rank, tp) if dim is not None else (0, tensor.shape[0])
            slices[name] = tensor.narrow(dim or 0, first, last - first).reshape(-1)
        for dp_rank in range(dp):
            ranges = {name: share(len(part), dp_rank, dp) for name, part in slices.items()}
            file = PartitionFile(folder / partition_file(tp_rank, dp_rank), ranges)
            for number in range(len(KINDS)):
                for name, (start, stop) in ranges.items():
                    file.write(slices[name][start:stop] + number)
            file.close()
    parameters = {name: {"shape": list(full[name].shape), "split_dim": dims[name]} for name in full}
    return Checkpoint(folder, {"parameters": parameters, "topology": {"dp": dp, "tp": tp}})


@pytest.mark.parametrize("vocab_size", [5, 10, 12])
@pytest.mark.parametrize(("dp", "tp"), [(1, 1), (2, 2), (3, 2), (2, 4), (1, 8)])
def test_rows_of_any_split_are_those_of_the_whole(vocab_size: int, dp: int, tp: int, tmp_path: Path) -> None:
    full = {
        WORD: torch.arange(float(vocab_size * WIDTH)).view(vocab_size, WIDTH),
        BIAS: torch.arange(float(vocab_size)),
        UP: torch.arange(8.0 * WIDTH).view(8, WIDTH),
        DOWN: torch.arange(8.0 * WIDTH).view(WIDTH, 8),
        NORM: torch.arange(float(WIDTH)),
    }
    checkpoint = written(tmp_path, full, {WORD: 0, BIAS: 0, UP: 0, DOWN: 1, NORM: None}, tp, dp)
    for name, tensor in full.items():
        for number, kind in enumerate(KINDS):
            assert torch.equal(checkpoint.full(name, kind), tensor + number), name
        for start in range(len(tensor)):
            for stop in range(start, len(tensor) + 1):
                assert torch.equal(checkpoint.rows(KINDS[0], name, start, stop), tensor[start:stop]), (name, start)


def test_a_partition_file_is_safetensors_whose_parts_have_the_digests_that_it_gave(tmp_path: Path) -> None:
    ranges = {WORD: (0, 6), NORM: (3, 3), UP: (5, 10)}  # the second has nothing on this rank
    held = {f"{kind}/{name}": torch.randn(stop - start) for kind in KINDS for name, (start, stop) in ranges.items()}
    entries = []
    for path, pieces in ((tmp_path / "whole", 100), (tmp_path / "in pieces", 2)):
        file = PartitionFile(path, ranges)
        for tensor in held.values():
            for piece in tensor.split(pieces):
                file.write(piece)
        entries.append(file.close())
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "in pieces").read_bytes()
    assert entries[0] == entries[1]
    read = load_file(path)
    assert read.keys() == held.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in held.items())
    parts = entries[0]["parts"]
    assert list(parts) == [HEAD, *KINDS]
    assert [start for start, _, _ in parts.values()] == [0, *(stop for _, stop, _ in parts.values())][:-1]
    assert parts[KINDS[-1]][1] == entries[0]["bytes"] == path.stat().st_size
    assert all(part_digest(path, start, stop) == digest for start, stop, digest in parts.values())


def test_a_file_with_too_much_or_too_little_in_it_is_never_closed(tmp_path: Path) -> None:
    file = PartitionFile(tmp_path / "one", {NORM: (0, 3)})
    with pytest.raises(AssertionError):
        file.close()
    with pytest.raises(AssertionError):
        file.write(torch.zeros(4))
