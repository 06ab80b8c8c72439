"""The global generators of torch, numpy and Python, from which a user's module or a library may draw.

What xlscale draws is keyed and needs none of them. They are seeded before every micro-step by what dropout is keyed by,
so that whatever draws in it draws as in a run that was never interrupted, with any number of loader processes, and a
checkpoint holds no state of a generator. Tensor-parallel ranks, which compute the same micro-batch, draw alike.
"""

import random

import numpy as np

from xlscale.models.dropout import key_of, seed_torch


def seed_generators(seed: int, slot: int) -> None:
    """Seed them, torch's of the GPU too, in 15 us, for the micro-batch of this rank that begins with `slot`."""
    key = key_of(seed, "generators", slot)
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    seed_torch(key)
