"""The order of the samples: quotas by language, a stateless permutation, slots that any cluster shares."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlscale.data.sampling import (
    QUOTA_BLOCK,
    LanguageSchedule,
    keyed_generator,
    language_probabilities,
    language_quotas,
    language_shares,
    micro_batch_slots,
    mix,
    permute,
)

SHARES_SUM = 1 << 32
# Counts of a realistic corpus: the largest of 100 languages has 100,000 times as much as the smallest.
REALISTIC = [int(10 ** (2 + 5 * i / 99)) for i in range(100)]
TINY = [
    10**12,
    10**11,
    1,
    3,
    1,
]  # with alpha = 1 three languages are due one slot in hundreds of millions of blocks


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 15, 16, 17, 63, 64, 65, 100, 255, 257, 1000, 4095, 4097, 70_000])
def test_permute_is_a_permutation_at_every_size(size: int) -> None:
    for key in (0, 1, 2**63 + 11):
        assert np.array_equal(np.sort(permute(np.arange(size), size, key)), np.arange(size))


@settings(max_examples=100, deadline=None)
@given(size=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_for_any_key(size: int, key: int) -> None:
    assert set(permute(np.arange(size), size, key).tolist()) == set(range(size))


def test_permute_takes_sizes_and_keys_row_by_row() -> None:
    draw = np.random.default_rng(0)
    sizes = draw.integers(1, 10_000, 300)
    index, keys = draw.integers(0, sizes), draw.integers(0, 2**63, 300)
    one_by_one = [permute(int(i), int(n), int(k))[0] for i, n, k in zip(index, sizes, keys, strict=True)]
    assert permute(index, sizes, keys).tolist() == one_by_one


def test_permute_reaches_huge_sizes() -> None:
    size = 2**40 + 12_345
    index = np.array([0, 1, size // 2, size - 1])
    assert len(set(permute(index, size, 5).tolist())) == 4
    assert (permute(index, size, 5) < size).all()


@pytest.mark.parametrize("size", [3, 4, 5])
def test_every_order_of_a_small_language_is_about_equally_likely(size: int) -> None:
    keys = mix(7, np.arange(12_000))
    images = np.stack([permute(i, size, keys) for i in range(size)], axis=1)
    orders, counts = np.unique(images, axis=0, return_counts=True)
    assert len(orders) == math.factorial(size)
    expected = len(keys) / len(orders)
    assert (np.abs(counts / expected - 1) < 0.5).all()


def test_neighbours_are_scattered_by_the_permutation() -> None:
    size = 10_000
    image = permute(np.arange(size), size, 3)
    assert (np.abs(np.diff(image)) < 100).mean() < 0.04  # 2 % by chance
    assert (image == permute(np.arange(size), size, 4)).sum() < 10


def test_probabilities_follow_the_power_of_the_counts() -> None:
    for alpha in (0.0, 0.3, 0.7, 1.0):
        expected = np.array(REALISTIC, dtype=float) ** alpha
        assert np.allclose(language_probabilities(REALISTIC, alpha), expected / expected.sum(), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 10**12), min_size=1, max_size=40), alpha=st.floats(0, 1))
def test_shares_are_whole_and_add_up(counts: list[int], alpha: float) -> None:
    shares = language_shares(counts, alpha)
    assert sum(shares) == SHARES_SUM
    assert min(shares) >= 1


def test_a_language_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="every language needs at least one sample"):
        language_shares([5, 0], 0.3)


@pytest.mark.parametrize(("counts", "alpha"), [(REALISTIC, 0.3), ([1], 0.3), ([1, 1, 1], 1.0), ([9, 5, 1], 0.7)])
def test_after_each_block_every_language_is_within_one_sample_of_its_share(counts: list[int], alpha: float) -> None:
    shares = language_shares(counts, alpha)
    before = [0] * len(shares)
    for block in range(300):
        start, quota = language_quotas(shares, block)
        assert start == before, "a block begins where the last one ended"
        assert sum(quota) == QUOTA_BLOCK
        before = [a + b for a, b in zip(start, quota, strict=True)]
        for share, total, inside in zip(shares, before, quota, strict=True):
            assert abs(total * SHARES_SUM - share * QUOTA_BLOCK * (block + 1)) < SHARES_SUM
            assert abs(inside * SHARES_SUM - share * QUOTA_BLOCK) < 2 * SHARES_SUM
        due = np.array([share * QUOTA_BLOCK * (block + 1) % SHARES_SUM for share in shares])
        rounded_up = np.array(before) * SHARES_SUM > np.array([s * QUOTA_BLOCK * (block + 1) for s in shares])
        assert due[rounded_up].min(initial=SHARES_SUM) >= due[~rounded_up].max(initial=0), "largest remainders"


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=12),
    alpha=st.floats(0, 1),
    block=st.integers(0, 10**6),
)
def test_quotas_are_whole_never_negative_and_join_up_anywhere(counts: list[int], alpha: float, block: int) -> None:
    shares = language_shares(counts, alpha)
    start, quota = language_quotas(shares, block)
    following, _ = language_quotas(shares, block + 1)
    assert min(quota) >= 0
    assert sum(quota) == QUOTA_BLOCK
    assert [a + b for a, b in zip(start, quota, strict=True)] == following
    for share, inside in zip(shares, quota, strict=True):
        assert abs(inside * SHARES_SUM - share * QUOTA_BLOCK) < 2 * SHARES_SUM


def test_a_tiny_language_is_neither_starved_nor_bunched() -> None:
    # due a sample every 37 blocks or so
    shares = language_shares([150_000, 1], 1.0)
    blocks = [block for block in range(3000) for _ in range(language_quotas(shares, block)[1][1])]
    due_every = SHARES_SUM / (shares[1] * QUOTA_BLOCK)
    assert len(blocks) == pytest.approx(3000 / due_every, abs=1)
    gaps = np.diff(blocks)
    assert gaps.min() >= due_every / 3
    assert gaps.max() <= due_every * 3


def test_a_language_of_one_slot_in_billions_keeps_its_turn() -> None:
    shares = language_shares(TINY, 1.0)
    span = 1 << 20
    start, _ = language_quotas(shares, span)
    assert all(
        abs(n * SHARES_SUM - share * QUOTA_BLOCK * span) < SHARES_SUM for n, share in zip(start, shares, strict=True)
    )


def test_each_language_counts_its_samples_without_gap_in_slot_order() -> None:
    schedule = LanguageSchedule(language_shares([1000, 30, 2], 0.5), seed=3)
    languages, samples = schedule(np.arange(3 * QUOTA_BLOCK))
    for language in range(3):
        mine = samples[languages == language]
        assert np.array_equal(mine, np.arange(len(mine)))


def test_languages_are_mixed_inside_a_block() -> None:
    languages, _ = LanguageSchedule(language_shares([1, 1], 0.3), seed=0)(np.arange(QUOTA_BLOCK))
    runs = max(len(list(run)) for _, run in itertools.groupby(languages.tolist()))
    assert runs < 25  # 12 is usual for 4096 throws of a coin
    for part in languages.reshape(-1, 256):
        assert abs(part.sum() - 128) < 50


def test_slots_can_be_asked_in_any_order_and_number() -> None:
    schedule = LanguageSchedule(language_shares(REALISTIC, 0.3), seed=1)
    slots = np.array([10**10, 5, QUOTA_BLOCK, 0, 5, QUOTA_BLOCK - 1])
    languages, samples = schedule(slots)
    single = [tuple(int(a[0]) for a in schedule(slots[i : i + 1])) for i in range(len(slots))]
    assert list(zip(languages.tolist(), samples.tolist(), strict=True)) == single


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_slices_of_all_ranks_and_micro_steps_are_the_global_batch(dp: int, accumulation: int) -> None:
    micro_batch_size = 48 // (dp * accumulation)
    slices = [
        micro_batch_slots(7, micro_step, rank, dp, micro_batch_size, 48)
        for micro_step in range(accumulation)
        for rank in range(dp)
    ]
    assert np.concatenate(slices).tolist() == list(range(7 * 48, 8 * 48))


def test_random_numbers_of_neighbouring_slots_do_not_overlap() -> None:
    # Philox counts up by one for every four numbers: as its counter a slot would share them with the next
    draws = np.concatenate([keyed_generator(1, 1, slot).random(2000) for slot in range(50)])
    assert len(np.unique(draws)) == len(draws)
    assert not np.array_equal(keyed_generator(1, 1, 0).random(5), keyed_generator(1, 2, 0).random(5))
    assert not np.array_equal(keyed_generator(1, 1, 0).random(5), keyed_generator(2, 1, 0).random(5))


def test_keys_of_different_decisions_are_different() -> None:
    keys = [int(mix(*values)[0]) for values in itertools.product(range(8), repeat=3)]
    assert len(set(keys)) == len(keys)
    assert mix(1, np.arange(5), 2).tolist() == [int(mix(1, i, 2)[0]) for i in range(5)]
