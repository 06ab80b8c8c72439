"""Which language a slot has: quotas, lanes, runs and phases; slots that any cluster shares."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlscale.data.sampling import (
    Lanes,
    LanguageSchedule,
    Phase,
    integer_shares,
    keyed_generator,
    language_probabilities,
    language_quotas,
    language_shares,
    micro_batch_slots,
    quotas,
)

SHARES_SUM = 1 << 32
SIZE = 4096  # of a quota block
# Counts of a realistic corpus: the largest of 100 languages has 100,000 times as much as the smallest.
REALISTIC = [int(10 ** (2 + 5 * i / 99)) for i in range(100)]
TINY = [
    10**12,
    10**11,
    1,
    3,
    1,
]  # with alpha = 1 three languages are due one slot in hundreds of millions of blocks


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
        start, quota = language_quotas(shares, block, SIZE)
        assert start == before, "a block begins where the last one ended"
        assert sum(quota) == SIZE
        before = [a + b for a, b in zip(start, quota, strict=True)]
        for share, total, inside in zip(shares, before, quota, strict=True):
            assert abs(total * SHARES_SUM - share * SIZE * (block + 1)) < SHARES_SUM
            assert abs(inside * SHARES_SUM - share * SIZE) < 2 * SHARES_SUM
        due = np.array([share * SIZE * (block + 1) % SHARES_SUM for share in shares])
        rounded_up = np.array(before) * SHARES_SUM > np.array([s * SIZE * (block + 1) for s in shares])
        assert due[rounded_up].min(initial=SHARES_SUM) >= due[~rounded_up].max(initial=0), "largest remainders"


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=12),
    alpha=st.floats(0, 1),
    block=st.integers(0, 10**6),
)
def test_quotas_are_whole_never_negative_and_join_up_anywhere(counts: list[int], alpha: float, block: int) -> None:
    shares = language_shares(counts, alpha)
    start, quota = language_quotas(shares, block, SIZE)
    following, _ = language_quotas(shares, block + 1, SIZE)
    assert min(quota) >= 0
    assert sum(quota) == SIZE
    assert [a + b for a, b in zip(start, quota, strict=True)] == following
    for share, inside in zip(shares, quota, strict=True):
        assert abs(inside * SHARES_SUM - share * SIZE) < 2 * SHARES_SUM


def test_a_tiny_language_is_neither_starved_nor_bunched() -> None:
    # due a sample every 37 blocks or so
    shares = language_shares([150_000, 1], 1.0)
    blocks = [block for block in range(3000) for _ in range(language_quotas(shares, block, SIZE)[1][1])]
    due_every = SHARES_SUM / (shares[1] * SIZE)
    assert len(blocks) == pytest.approx(3000 / due_every, abs=1)
    gaps = np.diff(blocks)
    assert gaps.min() >= due_every / 3
    assert gaps.max() <= due_every * 3


def test_a_language_of_one_slot_in_billions_keeps_its_turn() -> None:
    shares = language_shares(TINY, 1.0)
    span = 1 << 20
    start, _ = language_quotas(shares, span, SIZE)
    assert all(abs(n * SHARES_SUM - share * SIZE * span) < SHARES_SUM for n, share in zip(start, shares, strict=True))


# (global batch, lanes, run): one lane per slot, lanes of many slots, a batch of odd size, runs, one lane of long runs
CUTS = [(8, 0, 1), (2048, 0, 1), (24, 0, 1), (96, 4, 3), (64, 1, 16), (7, 7, 1)]
EPOCHS = [40_000, 900, 33, 1]


def schedule_of(cut: tuple[int, int, int], phases: list[Phase] | None = None, seed: int = 3) -> LanguageSchedule:
    """A schedule of four languages, one of them with a single sample."""
    phases = phases or [Phase(0, tuple(language_shares(EPOCHS, 0.3)))]
    return LanguageSchedule(phases, EPOCHS, Lanes.of(*cut), seed)


def block_slots(schedule: LanguageSchedule, blocks: int) -> np.ndarray:
    """Slots of the first quota blocks."""
    return np.arange(blocks * schedule.lanes.updates_per_block * schedule.lanes.batch)


@pytest.mark.parametrize("cut", CUTS)
def test_every_block_has_exactly_the_quotas_in_every_lane(cut: tuple[int, int, int]) -> None:
    schedule = schedule_of(cut)
    lanes, runs = schedule.lanes, len(block_slots(schedule, 1)) // schedule.lanes.run // schedule.lanes.lanes
    languages, _ = schedule(block_slots(schedule, 4))
    by_lane = languages.reshape(4, -1, lanes.lanes, lanes.batch // lanes.lanes).transpose(0, 2, 1, 3)
    for block in range(4):
        counts = language_quotas(schedule.phases[0].shares, block, runs)[1]
        for lane in by_lane[block]:
            assert (np.bincount(lane.reshape(-1), minlength=4) == np.array(counts) * lanes.run).all()


@pytest.mark.parametrize("cut", CUTS)
def test_each_language_counts_its_samples_without_gap_and_epoch_by_epoch(cut: tuple[int, int, int]) -> None:
    schedule = schedule_of(cut)
    languages, samples = schedule(block_slots(schedule, 3))
    for language, size in enumerate(EPOCHS):
        mine = samples[languages == language]
        assert np.array_equal(np.sort(mine), np.arange(len(mine)))
        assert (np.diff(mine // size) >= 0).all(), "nothing of the next epoch before this one is through"


@pytest.mark.parametrize("cut", CUTS)
def test_a_lane_keeps_to_its_own_samples_but_where_an_epoch_ends(cut: tuple[int, int, int]) -> None:
    schedule = schedule_of(cut)
    lanes, slots = schedule.lanes, block_slots(schedule, 2)
    languages, samples = schedule(slots)
    lane = slots % lanes.batch // (lanes.batch // lanes.lanes)
    largest = (languages == 0) & (samples < EPOCHS[0])
    inside = largest & (samples < samples[largest].max() - len(slots) // 2)
    assert (samples[inside] % lanes.lanes == lane[inside]).all()


def test_slots_come_in_runs_of_one_language() -> None:
    schedule = schedule_of((96, 4, 3))
    languages, _ = schedule(block_slots(schedule, 1))
    runs = languages.reshape(-1, 3)
    assert (runs == runs[:, :1]).all()
    assert (runs[1:, 0] != runs[:-1, 0]).any()


def test_phases_change_the_shares_at_their_step_and_count_on() -> None:
    late = [0, 0, 1, 1]  # two languages enter at update 700
    phases = [
        Phase(0, tuple(integer_shares([3, 1, 0, 0]))),
        Phase(700, tuple(integer_shares([1, 1, 1, 1]))),
        Phase(701, tuple(integer_shares(late))),
    ]
    schedule = schedule_of((24, 0, 1), phases)
    languages, samples = schedule(np.arange(24 * (701 + 4 * schedule.lanes.updates_per_block)))
    assert not np.isin(languages[: 24 * 700], (2, 3)).any()
    assert (np.bincount(languages[: 24 * 700], minlength=4) == [24 * 525, 24 * 175, 0, 0]).all()
    assert not np.isin(languages[24 * 701 :], (0, 1)).any()
    for language, size in enumerate(EPOCHS):
        mine = samples[languages == language]
        assert np.array_equal(np.sort(mine), np.arange(len(mine)))
        assert (np.diff(mine // size) >= 0).all()
    assert schedule.shares(699).tolist() == pytest.approx([0.75, 0.25, 0, 0])
    assert schedule.shares(701).tolist() == pytest.approx([0, 0, 0.5, 0.5])


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.integers(1, 3000), min_size=1, max_size=4, unique=True),
    weights=st.lists(st.lists(st.floats(0.001, 100), min_size=3, max_size=3), min_size=5, max_size=5),
    cut=st.sampled_from(CUTS),
)
def test_quotas_join_up_over_phases(steps: list[int], weights: list[list[float]], cut: tuple[int, int, int]) -> None:
    lanes = Lanes.of(*cut)
    phases = [Phase(step, tuple(integer_shares(w))) for step, w in zip([0, *sorted(steps)], weights, strict=False)]
    before = [0, 0, 0]
    for number, phase in enumerate(phases):
        updates = (phases[number + 1].step if number + 1 < len(phases) else phase.step + 2000) - phase.step
        for block in range(-(-updates // lanes.updates_per_block)):
            start, counts = quotas(phases, lanes, number, block)
            assert start == before
            assert min(counts) >= 0
            here = min(lanes.updates_per_block, updates - block * lanes.updates_per_block)
            if number + 1 < len(phases):
                assert sum(counts) == here * lanes.runs_per_update
            before = [a + b for a, b in zip(before, counts, strict=True)]


def test_a_language_that_weighs_nothing_is_not_drawn() -> None:
    shares = integer_shares([0, 1e-9, 1])
    assert shares[0] == 0
    assert shares[1] >= 1
    assert sum(shares) == SHARES_SUM


def test_languages_are_mixed_evenly_inside_a_block() -> None:
    schedule = LanguageSchedule([Phase(0, tuple(language_shares([1, 1], 0.3)))], [50, 50], Lanes.of(2048, 0, 1), seed=0)
    languages, _ = schedule(np.arange(2048 * 32))
    runs = max(len(list(run)) for _, run in itertools.groupby(languages.tolist()))
    assert runs < 25  # 15 is usual for so many throws of a coin
    for update in languages.reshape(-1, 2048):
        assert abs(update.sum() - 1024) < 64


def test_two_blocks_and_two_seeds_have_different_orders() -> None:
    orders = [schedule_of((8, 0, 1), seed=seed)(np.arange(8192 * 3))[0].reshape(3, -1) for seed in (0, 1)]
    assert len({order.tobytes() for both in orders for order in both}) == 6


def test_slots_can_be_asked_in_any_order_and_number() -> None:
    schedule = schedule_of((24, 0, 1))
    slots = np.array([10**10, 5, 8208, 0, 5, 8207])
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


@pytest.mark.parametrize(
    ("dp", "micro_batch_size", "run"), [(1, 12, 6), (2, 6, 2), (2, 6, 4), (3, 4, 6), (4, 6, 24), (2, 3, 24)]
)
def test_every_rank_has_an_equal_part_of_every_run_of_a_micro_step(dp: int, micro_batch_size: int, run: int) -> None:
    whole = dp * micro_batch_size
    slices = [
        [micro_batch_slots(7, i, rank, dp, micro_batch_size, 48, run) for rank in range(dp)] for i in range(48 // whole)
    ]
    for i, ranks in enumerate(slices):
        assert sorted(np.concatenate(ranks).tolist()) == list(range(7 * 48 + i * whole, 7 * 48 + (i + 1) * whole))
        runs = [np.unique(slots // run, return_counts=True) for slots in ranks]
        for numbers, counts in runs:
            assert (numbers.tolist(), counts.tolist()) == (runs[0][0].tolist(), runs[0][1].tolist())


def test_random_numbers_of_neighbouring_slots_do_not_overlap() -> None:
    # Philox counts up by one for every four numbers: as its counter a slot would share them with the next
    draws = np.concatenate([keyed_generator(1, 1, slot).random(2000) for slot in range(50)])
    assert len(np.unique(draws)) == len(draws)
    assert not np.array_equal(keyed_generator(1, 1, 0).random(5), keyed_generator(1, 2, 0).random(5))
    assert not np.array_equal(keyed_generator(1, 1, 0).random(5), keyed_generator(2, 1, 0).random(5))
