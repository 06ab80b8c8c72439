"""Which documents have a key in common: sorted part by part, all large arrays in files, so that neither a
language's size nor its number of duplicates decides how much memory a task takes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.steps.columns import ROWS as BLOCK
from data_pipelines.steps.columns import Parts, column

SORT_BYTES = 64  # memory that groups() takes for each key of a part
ROWS = 512  # of a file, looked at together
MOST = 2**31  # documents of a language: places and lists of them are counted in 32 bits


def groups(keys: np.ndarray, memory: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(places, sizes): places of equal keys side by side and rising, for every key that comes twice.

    `keys`: (N,) or, several numbers a key, (N, C), uint64. Sorts as many at once as `memory` bytes allow (and all
    that are equal), in parts that share no key: each reads all keys, N * SORT_BYTES / memory times.
    """
    keys = keys if keys.ndim == 2 else keys[:, np.newaxis]
    parts = np.uint64(len(keys) * SORT_BYTES // memory + 1)
    for part in range(int(parts)):
        found = []
        for start in range(0, len(keys), BLOCK):
            mine = np.flatnonzero(keys[start : start + BLOCK, 0] % parts == part)
            found.append((mine + start).astype(np.uint32))
        places = np.concatenate(found) if found else np.zeros(0, np.uint32)
        values = keys[places]
        order = np.lexsort(values.T)
        values, places = values[order], places[order]
        begins = np.flatnonzero(np.concatenate(([True], (values[1:] != values[:-1]).any(axis=1)))[: len(values)])
        sizes = np.diff(begins, append=len(values))
        yield places[np.repeat(sizes > 1, sizes)], sizes[sizes > 1]


def mark_firsts(keys: np.ndarray, memory: int, first: np.ndarray) -> None:
    """Sets `first` (uint32) to 1 + the place of the first of those with the same key, where that is another."""
    for places, sizes in groups(keys, memory):
        begins = np.cumsum(sizes) - sizes
        firsts = np.repeat(places[begins], sizes)
        first[places] = np.where(places == firsts, 0, firsts + 1)


def mark_lists(keys: np.ndarray, memory: int, lists: np.ndarray) -> None:
    """Sets `lists` (uint32) to 1 + where the list of those with the same key begins; 0 = it is alone.

    A list has room for their number and their places; one more value at the end says what all lists take.
    """
    assert len(keys) < MOST, f"{len(keys)} documents in a language, more than {MOST}"
    used = 0
    for places, sizes in groups(keys, memory):
        begins = used + np.cumsum(sizes + 1) - (sizes + 1)
        lists[places] = np.repeat(begins + 1, sizes)
        used += int(np.sum(sizes + 1))
    lists[-1] = used


def mark_repeats(keys: np.ndarray, memory: int, marks: np.ndarray) -> None:
    """Sets marks (uint8) to 1 where a key (uint64) has come before, in parts as groups(); one that comes millions
    of times takes no more memory than others.
    """
    parts = np.uint64(len(keys) * SORT_BYTES // memory + 1)
    for part in range(int(parts)):
        values, places = [np.zeros(0, np.uint64)], [np.zeros(0, np.int64)]
        for start in range(0, len(keys), BLOCK):
            block = keys[start : start + BLOCK]
            mine = np.flatnonzero(block % parts == part)
            some, first = np.unique(block[mine], return_index=True)
            marks[start + mine] = 1
            marks[start + mine[first]] = 0
            values.append(some)
            places.append(start + mine[first])
        all_values, all_places = np.concatenate(values), np.concatenate(places)
        order = np.argsort(all_values, kind="stable")
        again = all_values[order][1:] == all_values[order][:-1]
        marks[all_places[order][1:][again]] = 1


def scramble(hashes: np.ndarray) -> np.ndarray:
    """The end of splitmix64: sums that are linear in what they are made of become hashes (uint64)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


def band_keys(signatures: np.ndarray, bands: int) -> np.ndarray:
    """The hash of every band of some signatures (n, bands * rows), uint32: (bands, n), uint64."""
    block = signatures.astype(np.uint64).reshape(len(signatures), bands, -1)
    odd = np.cumprod(np.full(block.shape[2], 0x9E3779B97F4A7C15, dtype=np.uint64))
    return scramble((block * odd).sum(axis=2, dtype=np.uint64)).T


class BandIndex:
    """For each band: the documents that share it, as lists with room for those kept."""

    def __init__(self, signatures: np.ndarray | Parts, lists: Sequence[np.ndarray], folder: Path):
        """`signatures`: (N, bands * rows), uint32; `lists`: mark_lists() of each band's keys."""
        self.signatures, self.lists, self.bands = signatures, lists, len(lists)
        ends = np.cumsum([int(begins[-1]) for begins in lists])
        slots = column(folder / "slots", np.uint32, (int(ends[-1]),))
        self.slots = [slots[end - int(begins[-1]) : end] for end, begins in zip(ends, lists, strict=True)]

    def shared(self) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        """(place, its lists as (band, begin)) of the documents that share a band with another, in their order."""
        total = len(self.signatures)
        for start in range(0, total, ROWS):
            block = np.stack([begins[start : min(start + ROWS, total)] for begins in self.lists])
            for place in np.flatnonzero(block.any(axis=0)):
                row = block[:, place]
                yield start + int(place), [(int(band), int(row[band]) - 1) for band in np.flatnonzero(row)]

    def best(self, place: int, lists: list[tuple[int, int]]) -> tuple[float, int]:
        """(share of equal hashes, place) of the kept document most like this one, of equals the first; else (0, 0)."""
        slots = self.slots
        found = [slots[band][begin + 1 : begin + 1 + slots[band][begin]] for band, begin in lists]
        places, best = np.unique(np.concatenate(found)), (0.0, 0)
        for start in range(0, len(places), ROWS):
            some = places[start : start + ROWS]
            same = self.signatures[some] == self.signatures[place]
            # Hashes of bands may be equal where the bands are not.
            same &= same.reshape(len(some), self.bands, -1).all(axis=2).any(axis=1, keepdims=True)
            shares = same.mean(axis=1)
            most = int(np.argmax(shares))
            best = max(best, (float(shares[most]), -int(some[most])))
        return best[0], -best[1]

    def keep(self, place: int, lists: list[tuple[int, int]]) -> None:
        """Put a document into its lists."""
        for band, begin in lists:
            slots = self.slots[band]
            count = slots[begin] = slots[begin] + 1
            slots[begin + int(count)] = place


def mark_near(index: BandIndex, least: float, first: np.ndarray, shares: np.ndarray, sizes: np.ndarray) -> None:
    """One document after the other, each against those kept before that share a band with it.

    Sets `first` (uint32) to 1 + the place of the one it is like, `shares` (float64) to how much, from `least` on, and
    `sizes` (uint32) of that one to how many are like it; leaves out a document whose `first` is set.
    """
    for place, lists in index.shared():
        if first[place]:
            continue
        share, kept = index.best(place, lists)
        if share and share >= least:
            first[place], shares[place] = kept + 1, share
            sizes[kept] += 1
        else:
            index.keep(place, lists)
