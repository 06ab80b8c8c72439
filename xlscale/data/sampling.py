"""Which language each slot has, and which of its samples: closed forms of (seed, slot), no state, no history.

The global batch is cut into lanes, a lane's slots into runs of one language. Every lane has the same quotas, so that
the samples of a language before any block, in one lane or in all, are a closed form too.

Shares are integers and roundings integer arithmetic, so that any machine gets the same order to the bit.
G slots of a global batch, L lanes, R slots of a run, U runs of a lane in an update, Q runs of a lane in a quota block
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np

# Purposes of random decisions: the second half of a generator's key.
MASK, LANGUAGE_ORDER, PAGE_ORDER, TEXT_ORDER, REPLACEMENT = 1, 2, 3, 4, 5

QUOTA_RUNS = 1024  # at least so many runs of a lane are a quota block
_SHARES = 1 << 32  # what the integer shares of all languages add up to


def keyed_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Random numbers of one decision; only .random() of it is used, whose stream is the same in every numpy.

    The index is the counter's second word: the generator itself counts up the first, where the numbers of
    neighbouring indices would overlap.
    """
    key, counter = np.array([seed, purpose], dtype=np.uint64), np.array([0, index, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def language_shares(sizes: Sequence[int], alpha: float) -> list[int]:
    """p(language) ~ n ** alpha (XLM-R; alpha = 0.3 there) as integers that add up to 2 ** 32.

    ValueError for a language of size 0.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={list(sizes)}: every language needs at least one sample; leave out those with none")
    with localcontext() as context:
        # Decimal powers are the same on every machine; those of the C library are not, in the last bit.
        context.prec = 40
        return integer_shares([Decimal(size) ** Decimal(str(alpha)) for size in sizes])


def language_probabilities(sizes: Sequence[int], alpha: float) -> np.ndarray:
    """The same as fractions."""
    return np.array(language_shares(sizes, alpha)) / _SHARES


def integer_shares(weights: Sequence[float | Decimal]) -> list[int]:
    """Weights as integers that add up to 2 ** 32; only what weighs nothing gets 0."""
    with localcontext() as context:
        context.prec = 40
        exact = [Decimal(str(weight)) for weight in weights]
        drawn = sum(weight > 0 for weight in exact)
        # 1 is everyone's, so that no language that is drawn has a share of 0
        scaled = [weight * (_SHARES - drawn) / sum(exact) for weight in exact]
    shares = [int(value) + (value > 0) for value in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(scaled[i]) - scaled[i], i))
    for i in by_remainder[: _SHARES - sum(shares)]:
        shares[i] += 1
    return shares


def _apportion(shares: Sequence[int], whole: int, count: int) -> list[int]:
    """`count` divided by the shares of `whole`: each one's floor or ceiling, the largest remainders rounded up."""
    counts, remainders = zip(*(divmod(share * count, whole) for share in shares), strict=True)
    by_remainder = sorted(range(len(shares)), key=lambda i: (-remainders[i], i))
    rounded_up = set(by_remainder[: count - sum(counts)])
    return [count + (i in rounded_up) for i, count in enumerate(counts)]


def language_quotas(shares: Sequence[int], block: int, size: int) -> tuple[list[int], list[int]]:
    """What each language is due before quota block `block`, and in it; the latter add up to `size`.

    After each span of blocks (one, unless a language is due less than once in a block) every language is
    within one of its share. Inside a longer span, each half has half of what the whole has, and so on.
    """
    span, least = 1, min(share for share in shares if share)
    while least * size * span < _SHARES:
        span *= 2
    # From span to span every due rises by 1 or more: of such numbers neither floors nor ceilings ever fall.
    whole, inside = divmod(block, span)
    before = _apportion(shares, _SHARES, whole * span * size)
    after = _apportion(shares, _SHARES, (whole + 1) * span * size)
    counts = [end - start for start, end in zip(before, after, strict=True)]
    while span > 1:
        span //= 2
        first = _first_half(counts)
        if inside >= span:
            inside -= span
            before = [start + half for start, half in zip(before, first, strict=True)]
            counts = [count - half for count, half in zip(counts, first, strict=True)]
        else:
            counts = first
    return before, counts


def _first_half(counts: Sequence[int]) -> list[int]:
    """Half of each count; of the odd ones, an even number, every second one is rounded up."""
    up, halves = False, []
    for count in counts:
        up ^= bool(count % 2)
        halves.append(count // 2 + (count % 2 if up else 0))
    return halves


@dataclass(frozen=True)
class Phase:
    """Shares of the languages from an update on."""

    step: int
    """First update (0-based)."""
    shares: tuple[int, ...]
    """Of 2 ** 32; 0 = not drawn."""


@dataclass(frozen=True)
class Lanes:
    """How the global batch is cut: lanes of equal size, one after the other, each of runs of one language."""

    batch: int
    lanes: int
    run: int

    @classmethod
    def of(cls, batch: int, lanes: int, run: int) -> "Lanes":
        """As data.lanes and data.language_run say; 0 lanes = the largest number that divides the runs and 64."""
        return cls(batch, lanes or math.gcd(batch // run, 64), run)

    @property
    def runs_per_update(self) -> int:
        """U."""
        return self.batch // (self.run * self.lanes)

    @property
    def updates_per_block(self) -> int:
        """Updates of a quota block: whole ones, so that the slots of a block lie together."""
        return -(-QUOTA_RUNS // self.runs_per_update)


class LanguageSchedule:
    """Which language each slot has and which of its samples, numbered so that a lane's lie together in an epoch.

    A language that is due less than once in a lane's block comes once in all lanes of one block, and then not for some.
    epochs: samples of one epoch of each language; in slot order, all numbers of an epoch come before those of the next.
    """

    def __init__(self, phases: Sequence[Phase], epochs: Sequence[int], lanes: Lanes, seed: int):
        assert phases[0].step == 0 and len({len(epochs), *(len(phase.shares) for phase in phases)}) == 1
        self.phases, self.epochs, self.lanes, self.seed = tuple(phases), tuple(epochs), lanes, seed

    def __call__(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language (index) of each slot, and the number of its sample in that language, from 0; both [S] int64.

        Sample v belongs to lane v % L wherever that is possible: always, but where an epoch ends inside the block.
        """
        languages, samples = np.empty_like(slots), np.empty_like(slots)
        steps = slots // self.lanes.batch
        starts = [phase.step for phase in self.phases]
        phase_of = np.searchsorted(starts, steps, side="right") - 1
        blocks = (steps - np.take(starts, phase_of)) // self.lanes.updates_per_block
        for phase, block in {*zip(phase_of.tolist(), blocks.tolist(), strict=True)}:
            here = (phase_of == phase) & (blocks == block)
            first = (starts[phase] + block * self.lanes.updates_per_block) * self.lanes.batch
            language_of, sample_of = _block_schedule(self.phases, self.epochs, self.lanes, self.seed, phase, block)
            languages[here], samples[here] = language_of[slots[here] - first], sample_of[slots[here] - first]
        return languages, samples

    def shares(self, step: int) -> np.ndarray:
        """Share of each language in update `step`, adding up to 1."""
        phase = bisect_right(self.phases, step, key=lambda phase: phase.step) - 1
        return np.array(self.phases[phase].shares) / _SHARES


def quotas(phases: Sequence[Phase], lanes: Lanes, phase: int, block: int) -> tuple[list[int], list[int]]:
    """Runs of each language in every lane before quota block `block` of a phase, since slot 0, and in the block.

    A phase's last block ends with the phase: it has the same share of every quota.
    """
    before = [0] * len(phases[0].shares)
    for number in range(phase):
        last = -(-(phases[number + 1].step - phases[number].step) // lanes.updates_per_block) - 1
        start, counts = _quotas_in(phases, lanes, number, last)
        before = [sum(parts) for parts in zip(before, start, counts, strict=True)]
    start, counts = _quotas_in(phases, lanes, phase, block)
    return [sum(parts) for parts in zip(before, start, strict=True)], counts


def _quotas_in(phases: Sequence[Phase], lanes: Lanes, phase: int, block: int) -> tuple[list[int], list[int]]:
    """The same, counted from the start of the phase."""
    whole = lanes.updates_per_block
    before, counts = language_quotas(phases[phase].shares, block, whole * lanes.runs_per_update)
    if phase + 1 < len(phases):
        updates = phases[phase + 1].step - phases[phase].step - block * whole
        if updates < whole:
            counts = _apportion(counts, sum(counts), updates * lanes.runs_per_update)
    return before, counts


@lru_cache(maxsize=4)
def _block_schedule(
    phases: tuple[Phase, ...], epochs: tuple[int, ...], lanes: Lanes, seed: int, phase: int, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Language and sample of every slot of a quota block."""
    before, counts = quotas(phases, lanes, phase, block)
    L, R, U = lanes.lanes, lanes.run, lanes.runs_per_update
    grouped_Q = np.repeat(np.arange(len(counts)), counts)
    # A language's runs are spread evenly over the block, each at a random place of its part, in each lane another.
    nth_Q = np.concatenate([np.arange(count) for count in counts])
    index = phases[phase].step // lanes.updates_per_block + phase + block  # no two blocks have the same
    noise_LQ = keyed_generator(seed, LANGUAGE_ORDER, index).random((L, len(grouped_Q)))
    order_LQ = np.argsort((nth_Q + noise_LQ) / np.take(counts, grouped_Q), axis=1, kind="stable")
    runs = grouped_Q[order_LQ].reshape(L, -1, U).transpose(1, 0, 2).reshape(-1)
    languages = np.repeat(runs, R)

    # In the order of the slots a language's samples are numbered without a gap. Then, among those of one epoch, the
    # numbers are dealt out anew, so that each goes to its own lane.
    first = np.take(before, np.arange(len(counts))) * L * R
    by_language = np.argsort(languages, kind="stable")
    sizes = np.array(counts) * L * R
    numbers = np.empty_like(languages)
    starts = np.cumsum(sizes) - sizes
    numbers[by_language] = np.arange(len(languages)) - np.repeat(starts - first, sizes)
    epoch = numbers // np.take(epochs, languages)
    lane = np.tile(np.repeat(np.arange(L), U * R), len(runs) // (L * U))
    samples = np.empty_like(numbers)
    samples[np.lexsort((lane, epoch, languages))] = numbers[np.lexsort((numbers, numbers % L, epoch, languages))]
    return languages, samples


def micro_batch_slots(
    step: int, micro_step: int, dp_rank: int, dp: int, micro_batch_size: int, global_batch_size: int, run: int = 0
) -> np.ndarray:
    """Slots of one rank's micro-batch: those of all ranks and micro-steps are the update's global batch.

    run: each rank has an equal part of every run of so many slots, so that all have the same languages; 0 = a row of
    slots of its own.
    """
    whole = dp * micro_batch_size
    assert global_batch_size % whole == 0, "checked with the config"
    first = step * global_batch_size + micro_step * whole
    if run == 0 or run >= whole:  # a micro-step of all ranks lies within one run
        assert run == 0 or run % whole == 0, "checked with the config"
        return np.arange(first, first + micro_batch_size) + dp_rank * micro_batch_size
    assert whole % run == 0 and run % dp == 0, "checked with the config"
    part = run // dp
    starts = np.arange(first, first + whole, run) + dp_rank * part
    return (starts[:, None] + np.arange(part)).reshape(-1)
