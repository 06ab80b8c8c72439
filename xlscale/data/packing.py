"""Documents to blocks of one length, closed inside a chunk: a block depends on its own chunk alone.

B rows of a batch, T tokens of a block, N tokens of a chunk, D documents, C chunks, P pieces
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_VERSION = 1  # raise it when the same lengths give other blocks


@dataclass(frozen=True)
class Plan:
    """What the blocks of one chunk hold: runs of its tokens, called pieces."""

    pieces_P2: np.ndarray
    """[P, 2] int64, first token and the one after the last, by block and then in the order of the documents."""
    first: np.ndarray
    """[blocks + 1] int64: the pieces of block b are first[b] to first[b + 1]."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self.first) - 1


@dataclass(frozen=True)
class Packing:
    """How documents become blocks. It sees their lengths only, </s> included and 0 for one without tokens.

    A block begins with <s>, and what is left over at its end is padding.
    sentences: documents run on from block to block (RoBERTa's full sentences), and only a chunk's last block is padded.
        Without document_attention each document in a block begins with <s> of its own; one place that is left then
        stays empty, for <s> alone would be a document of nothing.
    documents: a block holds one document, or a part of one; long ones are cut every T - 1 tokens.
    best_fit: documents cut in the same way, and then parts of less than T - 1 tokens put together, the longest first,
        each into the block with the least room that takes it (best-fit decreasing; of equal ones the last added to).
    """

    kind: str
    sequence_length: int
    document_attention: bool
    """Whether tokens of a block attend to other documents in it; if not, it has segments."""
    bos_id: int
    pad_id: int

    def __post_init__(self) -> None:
        if self.kind not in _PLANS:
            raise ValueError(f"packing={self.kind!r} is not known; use one of {', '.join(_PLANS)}")
        if self.sequence_length < 2:
            raise ValueError(
                f"sequence_length={self.sequence_length} must be at least 2: <s> and a token; 512 is usual"
            )

    @property
    def segments(self) -> bool:
        """Whether documents of a block are told apart by segment ids; a block of one document needs none."""
        return not self.document_attention and self.kind != "documents"

    @property
    def name(self) -> str:
        """What the blocks of a chunk depend on besides its documents, as a file name."""
        return f"{self.kind}{'-apart' if self.segments else ''}-{self.sequence_length}-v{_VERSION}"

    def blocks(self, lengths: np.ndarray, documents_per_chunk: np.ndarray) -> np.ndarray:
        """Number of blocks [C] int64 of chunks whose documents have `lengths` [D], one chunk after the other."""
        width = self.sequence_length - 1
        if self.kind == "sentences" and not self.segments:
            return -(-_sums(lengths, documents_per_chunk) // width)
        if self.kind == "documents":
            return _sums(-(-lengths.astype(np.int64) // width), documents_per_chunk)
        ends = np.cumsum(documents_per_chunk, dtype=np.int64).tolist()
        starts = [0, *ends[:-1]]
        chunks = (lengths[start:end] for start, end in zip(starts, ends, strict=True))
        return np.fromiter((len(self.plan(chunk)) for chunk in chunks), np.int64, len(ends))

    def plan(self, lengths: np.ndarray) -> Plan:
        """The blocks of a chunk whose documents have `lengths` [D]."""
        return _PLANS[self.kind](lengths.astype(np.int64), self)

    def fill(
        self, plan: Plan, ids: np.ndarray, block: int, ids_T: np.ndarray, segments_T: np.ndarray | None = None
    ) -> None:
        """Write one block, padding included, into `ids_T`, from the chunk's `ids` [N].

        segments_T: where `segments`, gets the number of each token's document in the block, from 1; 0 = padding.
        """
        assert (segments_T is not None) == self.segments
        at = 0
        first, stop = plan.first.item(block), plan.first.item(block + 1)
        for number, (start, end) in enumerate(plan.pieces_P2[first:stop].tolist(), start=1):
            begin = at
            if segments_T is not None or number == 1:
                ids_T[at] = self.bos_id
                at += 1
            ids_T[at : at + end - start] = ids[start:end]
            at += end - start
            if segments_T is not None:
                segments_T[begin:at] = number
        ids_T[at:] = self.pad_id
        if segments_T is not None:
            segments_T[at:] = 0


def positions(segments_BT: np.ndarray) -> np.ndarray:
    """Position of every token inside its segment [B, T] int64, from 0; -1 where there is none, in padding."""
    place_T = np.arange(segments_BT.shape[1])
    begins_BT = np.diff(segments_BT, axis=1, prepend=0) != 0
    begin_BT = np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1)
    return np.where(segments_BT == 0, -1, place_T - begin_BT)


def _sums(values: np.ndarray, documents_per_chunk: np.ndarray) -> np.ndarray:
    """Sum of each chunk's values [C] int64."""
    counts = documents_per_chunk.astype(np.int64)
    assert counts.sum() == len(values)
    sums = np.zeros(len(counts), dtype=np.int64)
    some = counts > 0  # reduceat has no empty runs
    if some.any():
        sums[some] = np.add.reduceat(values, (np.cumsum(counts) - counts)[some], dtype=np.int64)
    return sums


def _cut(lengths: np.ndarray, width: int) -> np.ndarray:
    """Pieces [P, 2] of at most `width` tokens, none of two documents."""
    parts = -(-lengths // width)
    ends, before = np.cumsum(lengths), np.cumsum(parts) - parts
    total = int(parts.sum())
    starts = np.repeat(ends - lengths - before * width, parts) + np.arange(total) * width
    return np.stack([starts, np.minimum(starts + width, np.repeat(ends, parts))], axis=1)


def _one_each(pieces_P2: np.ndarray) -> Plan:
    return Plan(pieces_P2, np.arange(len(pieces_P2) + 1))


def _sentences(lengths: np.ndarray, packing: Packing) -> Plan:
    if packing.segments:
        return _sentences_apart(lengths, packing)
    # Documents run on: to the blocks a chunk is one long document.
    return _one_each(_cut(lengths.sum(keepdims=True), packing.sequence_length - 1))


def _sentences_apart(lengths: np.ndarray, packing: Packing) -> Plan:
    T = packing.sequence_length
    pieces: list[int] = []  # first token and the one after the last, in turn
    first: list[int] = []
    at = room = 0
    for length in lengths.tolist():
        end = at + length
        while at < end:
            if room < 2:  # <s> and a token
                first.append(len(pieces) // 2)
                room = T
            taken = min(end - at, room - 1)
            pieces += (at, at + taken)
            at += taken
            room -= taken + 1
    first.append(len(pieces) // 2)
    return Plan(np.array(pieces, dtype=np.int64).reshape(-1, 2), np.array(first, dtype=np.int64))


def _documents(lengths: np.ndarray, packing: Packing) -> Plan:
    return _one_each(_cut(lengths, packing.sequence_length - 1))


def _best_fit(lengths: np.ndarray, packing: Packing) -> Plan:
    own = int(packing.segments)  # <s> of every piece, or one of the block
    pieces_P2 = _cut(lengths, packing.sequence_length - 1)
    need_P = pieces_P2[:, 1] - pieces_P2[:, 0] + own
    capacity = packing.sequence_length - 1 + own
    blocks: list[list[int]] = []
    with_room: dict[int, list[list[int]]] = {}  # room -> the blocks that have it
    rooms = 0  # bit r: some block has room r, so that the least that suffices is the lowest bit from there on
    order = np.argsort(-need_P, kind="stable")  # of two that are as long, the earlier one first
    for number, need in zip(order.tolist(), need_P[order].tolist(), strict=True):
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            block = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, block = capacity, []
            blocks.append(block)
        block.append(number)
        if room > need:
            with_room.setdefault(room - need, []).append(block)
            rooms |= 1 << room - need
    # In the order of the documents again: else the longest would always stand first.
    blocks = sorted(sorted(block) for block in blocks)
    by_block = [number for block in blocks for number in block]
    return Plan(pieces_P2[by_block], np.cumsum([0, *map(len, blocks)]))


_PLANS: dict[str, Callable[[np.ndarray, Packing], Plan]] = {
    "sentences": _sentences,
    "documents": _documents,
    "best_fit": _best_fit,
}
