"""Dropout whose noise is a function of a key: the same on every rank that must agree, and again when recomputed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def key_of(*parts: object) -> int:
    """A 63-bit generator seed from anything that has a stable text."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


def seed_torch(seed: int) -> None:
    """Seed torch's generators, of the CPU and of this process's GPU.

    As torch.manual_seed, which takes 0.1 ms and more where there is no GPU: it notes the stack for a later one.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class DropoutKey:
    """What all dropout sites of one model draw from; the loop sets it before each micro-step."""

    def __init__(self) -> None:
        self.parts: tuple[object, ...] = ()

    def set(self, *parts: object) -> None:
        """Key of the coming forward pass and of its backward pass, for instance (seed, first slot)."""
        self.parts = parts


class KeyedDropout(nn.Module):
    """Drops elements with probability `p`; the same (key, site, share) drops the same elements on every rank.

    share: what tells ranks apart that hold different elements, () where all hold the same.
    """

    def __init__(self, p: float, site: int, key: DropoutKey, share: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.p, self.site, self.key, self.share = p, site, key, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of any shape, scaled by 1 / (1 - p) where it is kept."""
        if not self.training or self.p == 0.0:
            return x
        generator = torch.Generator(x.device).manual_seed(key_of(*self.key.parts, self.site, *self.share))
        # One byte per element is kept for the backward pass, not one number.
        dropped = torch.empty_like(x, dtype=torch.bool).bernoulli_(self.p, generator=generator)
        return (x / (1.0 - self.p)).masked_fill(dropped, 0.0)


@contextmanager
def seeded_attention(site: int, key: DropoutKey, tp_rank: int) -> Iterator[None]:
    """Seed torch's generators, of CPU and GPU alike, for the attention weights of one place and one rank's heads.

    Afterwards they stand alike on all tensor-parallel ranks again, for whatever else draws from them.
    """
    seed_torch(key_of(*key.parts, "attention", site, tp_rank))
    yield
    seed_torch(key_of(*key.parts, "behind attention", site))
