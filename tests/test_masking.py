"""Masking: the rates that are wanted, only ordinary tokens, another mask at every draw."""

import math

import numpy as np
import pytest

from xlscale.config_sections import MaskingConfig
from xlscale.data.masking import IGNORE, mask_tokens
from xlscale.data.sampling import MASK, keyed_generator

VOCABULARY, MASK_ID = 1000, 999
PIECES = range(4, MASK_ID)
DEFAULT = MaskingConfig()


def masked(ids: np.ndarray, slot: int, masking: MaskingConfig = DEFAULT) -> tuple[np.ndarray, np.ndarray]:
    return mask_tokens(ids, keyed_generator(5, MASK, slot), masking, PIECES, MASK_ID)


def block(slot: int) -> np.ndarray:
    """A row of 512 tokens as they come: <s>, pieces, a few </s> and <unk>, padding."""
    draw = np.random.default_rng(slot)
    ids = draw.integers(4, MASK_ID, 512).astype(np.uint16)
    ids[0], ids[draw.integers(1, 400, 5)], ids[draw.integers(1, 400, 5)], ids[500:] = 0, 2, 3, 1
    return ids


def within(count: int, of: int, probability: float) -> bool:
    """Whether a count lies within 4 standard deviations of the binomial's mean."""
    return abs(count - of * probability) <= 4 * math.sqrt(of * probability * (1 - probability))


@pytest.mark.parametrize(
    "masking",
    [DEFAULT, MaskingConfig(mlm_probability=0.4, mask_fraction=1.0, random_fraction=0.0),
     MaskingConfig(mlm_probability=0.05, mask_fraction=0.2, random_fraction=0.5)],
)  # fmt: skip
def test_rates_are_those_of_the_config_within_binomial_error(masking: MaskingConfig) -> None:
    ordinary = predicted = as_mask = as_random = kept = 0
    for slot in range(2000):
        ids = block(slot).astype(np.int64)
        inputs, labels = masked(ids, slot, masking)
        chosen = labels != IGNORE
        ordinary += int(((ids >= 4) & (ids < MASK_ID)).sum())
        predicted += int(chosen.sum())
        as_mask += int((inputs[chosen] == MASK_ID).sum())
        kept += int((inputs[chosen] == ids[chosen]).sum())
        as_random += int(((inputs[chosen] != ids[chosen]) & (inputs[chosen] != MASK_ID)).sum())
    assert within(predicted, ordinary, masking.mlm_probability)
    assert within(as_mask, predicted, masking.mask_fraction)
    # a random piece is now and then the very token that stood there
    random_other = masking.random_fraction * (1 - 1 / len(PIECES))
    assert within(as_random, predicted, random_other)
    assert within(kept, predicted, 1 - masking.mask_fraction - random_other)


def test_special_tokens_are_never_predicted_and_never_put_in() -> None:
    everything = MaskingConfig(mlm_probability=1.0, mask_fraction=0.0, random_fraction=1.0)
    seen = np.zeros(VOCABULARY, dtype=int)
    for slot in range(300):
        ids = block(slot)
        ids[10] = MASK_ID
        inputs, labels = masked(ids, slot, everything)
        special = (ids < 4) | (ids == MASK_ID)
        assert (labels[special] == IGNORE).all()
        assert (inputs[special] == ids[special]).all()
        assert (labels[~special] == ids[~special]).all()
        seen += np.bincount(inputs[~special], minlength=VOCABULARY)
    assert not seen[:4].any()
    assert not seen[MASK_ID]
    assert (seen[4:MASK_ID] > 0).all(), "every real piece is drawn"
    assert within(int(seen[4]), int(seen.sum()), 1 / len(PIECES))
    assert within(int(seen[MASK_ID - 1]), int(seen.sum()), 1 / len(PIECES))


def test_labels_are_the_tokens_before_the_change_and_the_rest_is_untouched() -> None:
    ids = block(0)
    before = ids.copy()
    inputs, labels = masked(ids, 0)
    assert np.array_equal(ids, before), "the stored block is not written to"
    chosen = labels != IGNORE
    assert np.array_equal(labels[chosen], ids[chosen])
    assert np.array_equal(inputs[~chosen], ids[~chosen])
    assert inputs.dtype == labels.dtype == np.int64


def test_every_slot_has_a_mask_of_its_own_and_always_the_same() -> None:
    ids = block(0)
    masks = {masked(ids, slot)[1].tobytes() for slot in range(1000)}
    assert len(masks) == 1000
    assert all(np.array_equal(a, b) for a, b in zip(masked(ids, 3), masked(ids, 3), strict=True))


def test_masks_of_neighbouring_slots_are_independent() -> None:
    # numbers shared between slots would show as the same positions, shifted
    ids = np.full(512, 7)
    chosen = np.stack([masked(ids, slot)[1] != IGNORE for slot in range(400)]).astype(float)
    for shift in range(-8, 9):
        a, b = chosen[:-1, 8:-8], np.roll(chosen[1:], shift, axis=1)[:, 8:-8]
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_a_row_without_ordinary_tokens_stays_as_it_is() -> None:
    inputs, labels = masked(np.array([0, 2, 3, 1, 1]), 0)
    assert inputs.tolist() == [0, 2, 3, 1, 1]
    assert (labels == IGNORE).all()
