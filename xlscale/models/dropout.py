"""Dropout whose mask is a function of a key, so that all tensor-parallel ranks drop the same elements."""

import hashlib

import torch
from torch import nn


def key_of(*parts: object) -> int:
    """A 63-bit generator seed from anything that has a stable text."""
    return int.from_bytes(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "little") >> 1


class DropoutKey:
    """What all dropout sites of one model draw from; the loop sets it before each micro-step."""

    def __init__(self) -> None:
        self.parts: tuple[object, ...] = ()

    def set(self, *parts: object) -> None:
        """Key of the coming forward pass, for instance (seed, first slot of the micro-batch)."""
        self.parts = parts


class KeyedDropout(nn.Module):
    """Drops elements with probability `p`; the same (key, site) drops the same elements on every rank and replay."""

    def __init__(self, p: float, site: int, key: DropoutKey) -> None:
        super().__init__()
        self.p, self.site, self.key = p, site, key

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` of any shape, scaled by 1 / (1 - p) where it is kept."""
        if not self.training or self.p == 0.0:
            return x
        generator = torch.Generator(x.device).manual_seed(key_of(*self.key.parts, self.site))
        keep = torch.empty_like(x).bernoulli_(1.0 - self.p, generator=generator)
        return x * keep.div_(1.0 - self.p)
