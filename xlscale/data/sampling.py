"""Which language and which sample of it a slot holds: closed forms of (seed, slot), no state, no history.

Shares are integers and roundings integer arithmetic, so that any machine gets the same order to the bit.
L languages, S slots
"""

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache

import numpy as np

# Purposes of random decisions: the second half of a generator's key.
MASK, LANGUAGE_ORDER, BLOCK_ORDER, TEXT_ORDER = 1, 2, 3, 4

QUOTA_BLOCK = 4096  # slots in which every language has its quota
_SHARES = 1 << 32  # what the integer shares of all languages add up to
_ROUNDS = 8  # of the Feistel network; 4 are enough for large sizes, small ones mix slowly
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_generator(seed: int, purpose: int, index: int) -> np.random.Generator:
    """Random numbers of one decision; only .random() of it is used, whose stream is the same in every numpy.

    The index is the counter's second word: the generator itself counts up the first, where the numbers of
    neighbouring indices would overlap.
    """
    key, counter = np.array([seed, purpose], dtype=np.uint64), np.array([0, index, 0, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def language_probabilities(counts: Sequence[int], alpha: float) -> np.ndarray:
    """p(language) ~ n ** alpha for languages of `counts` samples each (XLM-R; alpha = 0.3 there)."""
    return np.array(language_shares(counts, alpha)) / _SHARES


def language_shares(counts: Sequence[int], alpha: float) -> list[int]:
    """The probabilities as integers that add up to 2 ** 32, none of them 0.

    ValueError for a language without samples.
    """
    if not counts or min(counts) < 1:
        raise ValueError(f"counts={list(counts)}: every language needs at least one sample; leave out those with none")
    with localcontext() as context:
        # Decimal powers are the same on every machine; those of the C library are not, in the last bit.
        context.prec = 40
        weights = [Decimal(count) ** Decimal(str(alpha)) for count in counts]
        total = sum(weights)
        # 1 is everyone's, so that no language has a share of 0
        scaled = [weight * (_SHARES - len(weights)) / total for weight in weights]
    shares = [int(value) + 1 for value in scaled]
    by_remainder = sorted(range(len(shares)), key=lambda i: (int(scaled[i]) - scaled[i], i))
    for i in by_remainder[: _SHARES - sum(shares)]:
        shares[i] += 1
    return shares


def _apportion(shares: Sequence[int], slots: int) -> list[int]:
    """`slots` divided by the shares: each language's floor or ceiling, the largest remainders rounded up."""
    counts, remainders = zip(*(divmod(share * slots, _SHARES) for share in shares), strict=True)
    by_remainder = sorted(range(len(shares)), key=lambda i: (-remainders[i], i))
    rounded_up = set(by_remainder[: slots - sum(counts)])
    return [count + (i in rounded_up) for i, count in enumerate(counts)]


def language_quotas(shares: Sequence[int], block: int) -> tuple[list[int], list[int]]:
    """Samples of each language before quota block `block`, and in it; the latter add up to QUOTA_BLOCK.

    After each span of blocks (one, unless a language is due less than one slot in a block) every language is
    within one sample of its share. Inside a longer span, each half has half of what the whole has, and so on.
    """
    span = 1
    while min(shares) * QUOTA_BLOCK * span < _SHARES:
        span *= 2
    # From span to span every due rises by 1 or more: of such numbers neither floors nor ceilings ever fall.
    whole, inside = divmod(block, span)
    before = _apportion(shares, whole * span * QUOTA_BLOCK)
    after = _apportion(shares, (whole + 1) * span * QUOTA_BLOCK)
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


class LanguageSchedule:
    """Which sample of which language each slot holds, for languages of given shares."""

    def __init__(self, shares: Sequence[int], seed: int):
        self.shares, self.seed = tuple(shares), seed

    def __call__(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Language (index) of each slot, and which sample of that language it is, from 0; both [S] int64."""
        languages, samples = np.empty_like(slots), np.empty_like(slots)
        blocks, inside = np.divmod(slots, QUOTA_BLOCK)
        for block in np.unique(blocks):
            here = blocks == block
            language_of, sample_of = _block_schedule(self.shares, self.seed, int(block))
            languages[here], samples[here] = language_of[inside[here]], sample_of[inside[here]]
        return languages, samples


@lru_cache(maxsize=16)
def _block_schedule(shares: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Language and sample of every slot of a block: quotas in random order, a language's samples in order."""
    before, counts = language_quotas(shares, block)
    grouped = np.repeat(np.arange(len(shares)), counts)
    samples = np.concatenate([np.arange(start, start + count) for start, count in zip(before, counts, strict=True)])
    order = np.argsort(keyed_generator(seed, LANGUAGE_ORDER, block).random(QUOTA_BLOCK), kind="stable")
    languages = grouped[order]
    sample_of = np.empty(QUOTA_BLOCK, dtype=np.int64)
    sample_of[np.argsort(languages, kind="stable")] = samples
    return languages, sample_of


def mix(*values: int | np.ndarray) -> np.ndarray:
    """A 64-bit hash of integers, or arrays of them, for use as a key."""
    hashed = np.zeros(1, dtype=np.uint64)
    for value in values:
        hashed = _scramble((hashed ^ np.atleast_1d(np.asarray(value, dtype=np.uint64))) + _GOLDEN)
    return hashed


def _scramble(words: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every bit of each uint64 depends on all of its bits."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def permute(index: int | np.ndarray, size: int | np.ndarray, key: int | np.ndarray) -> np.ndarray:
    """Where the permutation of range(size) of that `key` puts `index`; [S] or numbers, returns [S] int64.

    A Feistel network on the next power of four, walked on until it is back below `size` (at most 2 ** 52).
    """
    index, size, key = np.broadcast_arrays(*(np.atleast_1d(np.asarray(a, dtype=np.uint64)) for a in (index, size, key)))
    assert (index < size).all(), "index out of range"
    # frexp's exponent is the bit length, exact for what a float64 holds
    bits = np.frexp((size - np.uint64(1)).astype(np.float64))[1]
    half = np.maximum((bits + 1) // 2, 1).astype(np.uint64)
    low = (np.uint64(1) << half) - np.uint64(1)
    result = index.copy()
    walking = np.arange(len(result))
    while len(walking):
        left, right = result[walking] >> half[walking], result[walking] & low[walking]
        round_key, bits_kept = key[walking], low[walking]
        for _ in range(_ROUNDS):
            round_key = round_key + _GOLDEN
            left, right = right, left ^ (_scramble(_scramble(round_key) ^ right) & bits_kept)
        result[walking] = (left << half[walking]) | right
        walking = walking[result[walking] >= size[walking]]
    return result.astype(np.int64)


def micro_batch_slots(
    step: int, micro_step: int, dp_rank: int, dp: int, micro_batch_size: int, global_batch_size: int
) -> np.ndarray:
    """Slots of one rank's micro-batch: those of all ranks and micro-steps are the update's global batch."""
    assert global_batch_size % (dp * micro_batch_size) == 0, "checked with the config"
    first = step * global_batch_size + (micro_step * dp + dp_rank) * micro_batch_size
    return np.arange(first, first + micro_batch_size)
