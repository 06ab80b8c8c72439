"""Initial weights depend on the seed alone."""

import pytest
import torch

from xlscale.models.families import preset
from xlscale.models.init import BLOCK, initial_rows

MODEL = preset("xlm-roberta-base")
NAME = "encoder.layers.3.mlp.up.weight"


def rows(name: str, shape: tuple[int, ...], start: int, stop: int, seed: int = 0) -> torch.Tensor:
    return initial_rows(name, shape, MODEL, seed, start, stop)


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 6), (0, 100), (63, 65), (99, 100)])
def test_any_rows_equal_those_of_the_whole_tensor(start: int, stop: int) -> None:
    shape = (100, BLOCK // 64)  # a block of normals ends in the middle, at row 64
    whole = rows(NAME, shape, 0, 100)
    assert torch.equal(rows(NAME, shape, start, stop), whole[start:stop])


def test_seed_and_name_are_the_key() -> None:
    shape = (8, 16)
    assert torch.equal(rows(NAME, shape, 0, 8), rows(NAME, shape, 0, 8))
    assert not torch.equal(rows(NAME, shape, 0, 8), rows(NAME, shape, 0, 8, seed=1))
    assert not torch.equal(rows(NAME, shape, 0, 8), rows(NAME.replace("3", "4"), shape, 0, 8))


def test_distribution_is_the_recipes() -> None:
    values = rows(NAME, (1000, 256), 0, 1000)
    assert values.std().item() == pytest.approx(0.02, rel=0.01)
    assert abs(values.mean().item()) < 1e-4
    words = rows("encoder.embeddings.word.weight", (50, 8), 0, 50)
    assert not words[1].any() and words[0].any() and words[2].any()
    assert torch.equal(rows("encoder.embeddings.word.weight", (50, 8), 1, 3), words[1:3])
    assert not rows("encoder.layers.0.mlp.up.bias", (64,), 0, 64).any()
    assert torch.equal(rows("encoder.layers.0.mlp_norm.weight", (64,), 0, 64), torch.ones(64))
    assert not rows("encoder.layers.0.mlp_norm.bias", (64,), 0, 64).any()
