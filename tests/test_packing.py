"""Packing: every token once and in order, documents separated, nothing from another chunk."""

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xlscale.data.packing import Packing, positions

BOS, PAD, EOS = 0, 1, 2
FIRST = 100
"""Token i of a chunk is FIRST + i, so that each is known again."""
KINDS = [(kind, attention) for kind in ("sentences", "documents", "best_fit") for attention in (True, False)]
all_kinds = pytest.mark.parametrize(("kind", "attention"), KINDS)

chunks = st.integers(2, 20).flatmap(
    lambda T: st.tuples(
        st.just(T),
        st.lists(
            st.sampled_from([0, 1, 2, T - 2, T - 1, T, 2 * T - 2, 2 * T - 1]) | st.integers(0, 4 * T), max_size=14
        ),
    )
)
"""A sequence length and the lengths of a chunk's documents: empty, long, just fitting, one more."""


def full_sentences(documents: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """The rule of the first release, as it stood there: documents end with </s> and run on from block to block."""
    stream = np.concatenate([np.append(ids, EOS) for ids in documents if len(ids)] or [np.empty(0, dtype=np.int64)])
    width = length - 1
    blocks = -(-len(stream) // width)
    packed = np.full((blocks, width), PAD, dtype=np.int64)
    packed.reshape(-1)[: len(stream)] = stream
    return np.concatenate([np.full((blocks, 1), BOS, dtype=np.int64), packed], axis=1)


def of(kind: str, attention: bool, T: int) -> Packing:
    return Packing(kind, T, attention, BOS, PAD)


def rows(packing: Packing, lengths: list[int], ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """All blocks of a chunk, and their segments where there are such; what was there before must not show."""
    plan = packing.plan(np.array(lengths, dtype=np.uint32))
    if ids is None:
        ids = np.arange(FIRST, FIRST + sum(lengths), dtype=np.uint32)
    ids_BT = np.full((len(plan), packing.sequence_length), -7)
    segments_BT = np.full(ids_BT.shape, -7, dtype=np.int32) if packing.segments else None
    for block in reversed(range(len(plan))):
        packing.fill(plan, ids, block, ids_BT[block], None if segments_BT is None else segments_BT[block])
    return ids_BT, segments_BT


@all_kinds
@settings(max_examples=80, deadline=None)
@given(chunk=chunks)
def test_blocks_hold_every_token_once_and_nothing_else(
    kind: str, attention: bool, chunk: tuple[int, list[int]]
) -> None:
    T, lengths = chunk
    ids_BT, _ = rows(of(kind, attention, T), lengths)
    tokens = ids_BT[ids_BT >= FIRST]
    if kind == "best_fit":
        assert (np.diff(np.where(ids_BT < FIRST, 0, ids_BT), axis=1)[ids_BT[:, 1:] >= FIRST] > 0).all(), "in a block"
        tokens = np.sort(tokens)
    assert np.array_equal(tokens, np.arange(FIRST, FIRST + sum(lengths)))
    assert np.isin(ids_BT[ids_BT < FIRST], (BOS, PAD)).all()
    assert (ids_BT[:, 0] == BOS).all() and (ids_BT[:, 1] >= FIRST).all(), "a block of nothing"


@all_kinds
@settings(max_examples=60, deadline=None)
@given(several=st.lists(chunks.map(lambda chunk: chunk[1]), max_size=6), T=st.integers(2, 20))
def test_as_many_blocks_are_counted_as_there_are(kind: str, attention: bool, several: list[list[int]], T: int) -> None:
    packing = of(kind, attention, T)
    lengths = np.array([length for chunk in several for length in chunk], dtype=np.uint32)
    counted = packing.blocks(lengths, np.array([len(chunk) for chunk in several], dtype=np.uint16))
    assert counted.dtype == np.int64
    assert counted.tolist() == [len(rows(packing, chunk)[0]) for chunk in several]


@all_kinds
@settings(max_examples=80, deadline=None)
@given(chunk=chunks)
def test_only_ends_of_blocks_are_padded(kind: str, attention: bool, chunk: tuple[int, list[int]]) -> None:
    T, lengths = chunk
    ids_BT, _ = rows(of(kind, attention, T), lengths)
    padding_BT = ids_BT == PAD
    assert (np.diff(padding_BT.astype(int), axis=1) >= 0).all()
    if kind == "sentences":  # one place does not take <s> and a token
        assert (padding_BT[:-1].sum(1) <= (0 if attention else 1)).all()


@all_kinds
@settings(max_examples=80, deadline=None)
@given(chunk=chunks)
def test_each_segment_is_of_one_document_and_begins_with_bos_at_position_0(
    kind: str, attention: bool, chunk: tuple[int, list[int]]
) -> None:
    T, lengths = chunk
    packing = of(kind, attention, T)
    ids_BT, segments_BT = rows(packing, lengths)
    assert packing.segments == (not attention and kind != "documents")
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    if segments_BT is None:
        assert ((ids_BT == BOS).sum(1) == 1).all()
        return
    assert np.array_equal(segments_BT == 0, ids_BT == PAD)
    positions_BT = positions(segments_BT)
    assert np.array_equal(positions_BT == 0, ids_BT == BOS) and np.array_equal(positions_BT == -1, ids_BT == PAD)
    for ids_T, segments_T, positions_T in zip(ids_BT, segments_BT, positions_BT, strict=True):
        assert np.unique(segments_T[segments_T > 0]).tolist() == list(range(1, segments_T.max() + 1))
        for number in range(1, segments_T.max() + 1):
            piece, places = ids_T[segments_T == number], positions_T[segments_T == number]
            assert places.tolist() == list(range(len(piece))) and len(piece) > 1
            assert len(set(document_of[piece[1:] - FIRST])) == 1 and (np.diff(piece[1:]) == 1).all()


@pytest.mark.parametrize("attention", [True, False])
@settings(max_examples=80, deadline=None)
@given(chunk=chunks)
def test_documents_are_cut_every_width_tokens_and_nowhere_else(attention: bool, chunk: tuple[int, list[int]]) -> None:
    T, lengths = chunk
    offset = np.concatenate([np.arange(length) for length in lengths] or [np.empty(0, int)])
    part = np.repeat(np.arange(len(lengths)), lengths) * 1000 + offset // (T - 1)
    for kind in ("documents", "best_fit"):
        ids_BT, _ = rows(of(kind, attention, T), lengths)
        parts_of = [np.unique(part[ids_T[ids_T >= FIRST] - FIRST]) for ids_T in ids_BT]
        if kind == "documents":
            assert all(len(parts) == 1 for parts in parts_of)
        assert np.sort(np.concatenate(parts_of or [part])).tolist() == np.unique(part).tolist(), "a part in two blocks"


@pytest.mark.parametrize("attention", [True, False])
@settings(max_examples=120, deadline=None)
@given(chunk=chunks)
def test_best_fit_is_best_fit_decreasing_and_never_takes_more_blocks_than_documents(
    attention: bool, chunk: tuple[int, list[int]]
) -> None:
    T, lengths = chunk
    own, width = int(not attention), T - 1
    parts = [width] * sum(length // width for length in lengths) + [n % width for n in lengths if n % width]
    bins: list[list[int]] = []  # the one that was last added to is the last
    for part in sorted(parts, reverse=True):
        room = [width + own - sum(b) - own * len(b) for b in bins]
        fitting = [(r, -i) for i, r in enumerate(room) if r >= part + own]
        bins.append([*bins.pop(-min(fitting)[1]), part] if fitting else [part])
    ids_BT, segments_BT = rows(of("best_fit", attention, T), lengths)
    assert len(ids_BT) == len(bins) <= len(rows(of("documents", attention, T), lengths)[0])
    if segments_BT is not None:
        found = [(np.bincount(row[row > 0])[1:] - 1).tolist() for row in segments_BT]
        assert sorted(sorted(block) for block in found) == sorted(sorted(b) for b in bins)


@settings(max_examples=120, deadline=None)
@given(documents=st.lists(st.lists(st.integers(4, 99), max_size=40), max_size=12), T=st.integers(2, 20))
def test_full_sentences_are_those_of_the_first_release(documents: list[list[int]], T: int) -> None:
    lengths = [len(ids) + 1 if ids else 0 for ids in documents]
    ids = np.array([token for document in documents if document for token in [*document, EOS]], dtype=np.uint16)
    ids_BT, _ = rows(of("sentences", True, T), lengths, ids)
    assert np.array_equal(ids_BT, full_sentences(documents, T))


@pytest.mark.parametrize(
    ("kind", "attention", "expected"),
    [
        ("sentences", True, [[0, 5, 5, 6, 6], [0, 6, 6, 6, 6], [0, 7, 7, 8, 8], [0, 9, 1, 1, 1]]),
        ("sentences", False, [[0, 5, 5, 0, 6], [0, 6, 6, 6, 6], [0, 6, 0, 7, 7], [0, 8, 8, 0, 9]]),
        ("documents", True, [[0, 5, 5, 1, 1], [0, 6, 6, 6, 6], [0, 6, 6, 1, 1], [0, 7, 7, 1, 1], [0, 8, 8, 1, 1],
                             [0, 9, 1, 1, 1]]),
        ("best_fit", True, [[0, 5, 5, 6, 6], [0, 6, 6, 6, 6], [0, 7, 7, 8, 8], [0, 9, 1, 1, 1]]),
        ("best_fit", False, [[0, 5, 5, 1, 1], [0, 6, 6, 6, 6], [0, 6, 6, 1, 1], [0, 7, 7, 1, 1], [0, 8, 8, 0, 9]]),
    ],
)  # fmt: skip
def test_a_known_packing(kind: str, attention: bool, expected: list[list[int]]) -> None:
    lengths, ids = [2, 6, 0, 2, 2, 1], np.array([5, 5, 6, 6, 6, 6, 6, 6, 7, 7, 8, 8, 9])
    assert sorted(rows(of(kind, attention, 5), lengths, ids)[0].tolist()) == sorted(expected)


@all_kinds
@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_documents_without_tokens_make_no_block(kind: str, attention: bool, lengths: list[int]) -> None:
    packing = of(kind, attention, 8)
    assert rows(packing, lengths)[0].shape == (0, 8)
    assert packing.blocks(np.array(lengths, dtype=np.uint32), np.array([len(lengths), 0])).tolist() == [0, 0]


@all_kinds
def test_a_document_longer_than_32_bits_of_tokens_is_counted(kind: str, attention: bool) -> None:
    if kind == "documents" or attention:  # the others write each piece down
        T = 1 << 20
        lengths = np.array([2**32 - 1, 2**32 - 1], dtype=np.uint32)
        assert of(kind, attention, T).blocks(lengths, np.array([1, 1])).tolist() == [4097, 4097]


@pytest.mark.parametrize("kind", ["sentences", "documents"])
def test_chunks_are_counted_without_a_loop(kind: str) -> None:
    """5M chunks of 128 documents are some 1000 shards of this size."""
    lengths = np.random.default_rng(0).integers(0, 2000, 4_000_000).astype(np.uint32)
    started = time.perf_counter()
    counted = of(kind, True, 512).blocks(lengths, np.full(500_000, 8))
    assert time.perf_counter() - started < 5  # about 0.1; a loop takes 15
    assert counted[:3].tolist() == [len(of(kind, True, 512).plan(lengths[i : i + 8])) for i in (0, 8, 16)]


def test_only_what_changes_the_blocks_changes_the_name() -> None:
    names = {(kind, attention): of(kind, attention, 512).name for kind, attention in KINDS}
    assert names["documents", True] == names["documents", False]
    assert len(set(names.values())) == 5
    assert of("sentences", True, 256).name != names["sentences", True]
    assert Packing("sentences", 512, True, 7, 9).name == names["sentences", True]


def test_what_makes_no_packing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sequence_length=1 must be at least 2: <s> and a token"):
        of("sentences", True, 1)
    with pytest.raises(ValueError, match="packing='sentence' is not known; use one of sentences, documents, best_fit"):
        of("sentence", True, 8)
