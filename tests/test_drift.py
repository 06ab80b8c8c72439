"""The digest of a tensor: the same bits in the same places, or another number."""

import pytest
import torch

from xlscale.parallel import drift
from xlscale.parallel.drift import digest


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def values(request: pytest.FixtureRequest) -> torch.Tensor:
    return torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(request.param)


def test_digest_is_of_the_bits_and_their_places(values: torch.Tensor) -> None:
    same = digest(values)
    assert digest(values.clone().view(10, 100)) == same
    bits = values.view(torch.int32 if values.dtype == torch.float32 else torch.int16)
    for place in (0, 500, 999):
        for bit in range(8 * values.element_size() - 1):
            changed = bits.clone()
            changed[place] ^= 1 << bit
            assert digest(changed.view(values.dtype)) != same
        changed = values.clone()
        changed[place] = -changed[place]
        assert digest(changed) != same
    assert digest(values.flip(0)) != same
    assert digest(values[:-1]) != same


def test_digest_tells_zeros_and_nans_apart() -> None:
    zeros = torch.zeros(8)
    assert digest(zeros) != digest(-zeros)
    assert digest(zeros) != digest(torch.zeros(9))
    assert digest(torch.full((8,), torch.nan)) == digest(torch.full((8,), torch.nan))


def test_digest_of_many_chunks_is_that_of_one(values: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digest(values)
    monkeypatch.setattr(drift, "_CHUNK", 64)
    assert digest(values) == whole
    assert digest(torch.cat([values[64:128], values[:64], values[128:]])) != whole


def test_no_two_of_many_digests_are_equal() -> None:
    """One element changed by the smallest step, at each place and to many values."""
    values = torch.ones(4096)
    found = set()
    for place in range(4096):
        changed = values.clone()
        changed.view(torch.int32)[place] += 1 + place % 7
        found.add(int(digest(changed)))
    assert len(found) == 4096
