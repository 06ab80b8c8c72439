"""Digests that add up: parts of any split of a tensor give the digest of the whole, and no wrong element passes."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from xlscale.checkpoint.digests import BLOCK, digest, file_digests
from xlscale.parallel.sharded import share

ROWS, COLUMNS = 37, 5000
WHOLE = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
MOD = 1 << 64


def parts(tensor: torch.Tensor, dim: int | None, tp: int, dp: int) -> int:
    """The sum of the digests of all ranks' partitions."""
    total = 0
    for tp_rank, dp_rank in itertools.product(range(tp), range(dp)):
        low, high = share(tensor.shape[dim or 0], tp_rank, tp)
        flat = (tensor if dim is None else tensor.narrow(dim, low, high - low)).reshape(-1)
        start, stop = share(flat.numel(), dp_rank, dp)
        if dim is None:
            total += digest(flat[start:stop], start) if not tp_rank else 0
        elif dim == 0:
            total += digest(flat[start:stop], start + low * COLUMNS)
        else:
            total += digest(flat[start:stop], start, high - low, COLUMNS, low)
    return total % MOD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [None, 0, 1])
@pytest.mark.parametrize(("tp", "dp"), [(1, 1), (2, 3), (4, 2), (8, 1)])
def test_parts_of_any_split_add_up_to_the_whole(dtype: torch.dtype, dim: int | None, tp: int, dp: int) -> None:
    tensor = WHOLE.to(dtype)
    assert parts(tensor, dim, tp, dp) == digest(tensor.reshape(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_anywhere_and_two_elements_exchanged_change_it(dtype: torch.dtype) -> None:
    tensor = WHOLE.reshape(-1)[: BLOCK + 100].to(dtype)
    known, size = digest(tensor), tensor.element_size()
    ints = tensor.view({2: torch.int16, 4: torch.int32}[size])
    for place, bit in itertools.product((0, BLOCK - 1, BLOCK, len(tensor) - 1), range(8 * size)):
        flipped = ints.clone()
        flipped[place] ^= torch.tensor(1, dtype=torch.int64).bitwise_left_shift(bit).to(ints.dtype)
        assert digest(flipped.view(dtype)) != known, (place, bit)
    exchanged = tensor.clone()
    exchanged[[3, BLOCK + 3]] = tensor[[BLOCK + 3, 3]]
    assert digest(exchanged) != known
    assert digest(torch.zeros(8)) != digest(torch.zeros(9)), "elements that are not there are seen"


def test_file_is_read_back_in_pieces(tmp_path) -> None:
    tensors = {"a": WHOLE, "b": WHOLE[0].clone(), "c": WHOLE.bfloat16()}
    save_file(tensors, tmp_path / "x.safetensors")
    found = file_digests(tmp_path / "x.safetensors", {f"our {name}": name for name in tensors}, 2 * COLUMNS)
    assert found == {f"our {name}": digest(tensor.reshape(-1)) for name, tensor in tensors.items()}
