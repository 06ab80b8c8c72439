"""New pieces for a SentencePiece model: learnt from a language's text and appended, the ids of the old ones kept.

What becomes of old text is a matter of the new pieces' scores. Their learner knows one language; the extended model has
all, so a piece scores what the learner gave it less DISCOUNT, the log of that language's share. No piece scores below
the old ones' lowest: <unk> is counted from there, so text that has no use for a new piece is cut exactly as it was.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import sentencepiece

from xlscale.tokenizer import FIRST_PIECE, SentencePieceTokenizer, train_sentencepiece
from xlscale.tokenizer_hub import SPECIAL_TOKENS

DISCOUNT = 5.0
"""Nats below the learner's score. Six languages of the demo's corpus, each added to 16,000 pieces of six others, change
0.004 to 0.42 % of the old text's tokens with it, a third or less of what they do with 0, and their own text gets up to
3 % longer; 10 changes little less and makes it up to 7 % longer (tests/benchmarks/results/vocabulary.md)."""
_POOL = 3  # pieces learnt for each one wanted: which of them are used is seen on the text only
_BATCH = 1000  # texts encoded at a time
_SHIFT = 1  # the Hub's id of a piece less the model's own


@dataclass(frozen=True)
class Candidate:
    """A piece that the old model lacks."""

    piece: str
    score: float
    """Log probability in the extended model."""
    parts: int
    """Pieces of its old cut; every unknown character is one."""


@dataclass(frozen=True)
class Choice:
    """The pieces taken, and what that came from."""

    tokenizer: SentencePieceTokenizer
    """The old one with these pieces appended."""
    pieces: list[str]
    left_out: list[str]
    """Pieces that old text has a use for, with protection."""


class Cuts:
    """How a model cuts letters as they stand, "▁" for a space: nothing is normalised, no space is put before."""

    def __init__(self, tokenizer: SentencePieceTokenizer):
        proto = tokenizer.parsed()
        normal = (proto.SentencePiece.NORMAL, proto.SentencePiece.USER_DEFINED)
        self.scores = {piece.piece: piece.score for piece in proto.pieces if piece.type in normal}
        self.lowest = min(self.scores.values())
        spec = proto.normalizer_spec
        spec.name, spec.precompiled_charsmap = "identity", b""
        spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())

    def cut(self, letters: Sequence[str]) -> list[list[str]]:
        """Pieces of each of some strings; every unknown character is one of its own."""
        cuts = self._processor.encode(list(letters), out_type=str) if letters else []
        return [[part for piece in pieces for part in ([piece] if piece in self.scores else piece)] for pieces in cuts]


def learn_candidates(
    old: SentencePieceTokenizer, texts: Sequence[str], count: int, discount: float = DISCOUNT
) -> list[Candidate]:
    """Pieces of some texts that `old` lacks, in a fixed order: `count` times three where the texts yield so many.

    discount: as DISCOUNT.
    """
    # The old model's own normalisation, so that every piece can stand in what it sees.
    lines = [text.replace("▁", " ") for text in old.normalised(texts)]
    characters = {character for line in lines for character in line}
    with tempfile.TemporaryDirectory() as folder:
        learnt = train_sentencepiece(lines, FIRST_PIECE + 2 + len(characters) + _POOL * count, folder, exact=False)
    cuts, own = Cuts(old), Cuts(learnt).scores
    fresh = [piece for piece in own if piece not in cuts.scores and piece not in SPECIAL_TOKENS]
    return [
        Candidate(piece, max(own[piece] - discount, cuts.lowest), len(cut))
        for piece, cut in zip(fresh, cuts.cut(fresh), strict=True)
    ]


def choose_pieces(
    old: SentencePieceTokenizer,
    candidates: Sequence[Candidate],
    texts: Sequence[str],
    count: int,
    protected: Sequence[str] = (),
    log: Callable[[str], None] = lambda message: None,
) -> Choice:
    """The `count` pieces that save most tokens of `texts`, without any that is used in one of the `protected`.

    What is left out may let another piece into a protected text: it is tried until none of these changes.
    """
    pool, left_out = list(candidates), list[str]()
    while True:
        best = _best(old, pool, texts, count)
        trial = appended(old, best)
        used = uses(trial, protected)[old.mask_id : trial.mask_id] > 0
        if not used.any():
            return Choice(trial, [candidate.piece for candidate in best], left_out)
        caught = {candidate.piece for candidate, is_used in zip(best, used, strict=True) if is_used}
        left_out += sorted(caught)
        pool = [candidate for candidate in pool if candidate.piece not in caught]
        log(f"{len(caught)} pieces change the cut of old text and are left out; {len(pool)} remain to choose from")


def _best(old: SentencePieceTokenizer, pool: Sequence[Candidate], texts: Sequence[str], count: int) -> list[Candidate]:
    """The `count` of a pool that save most tokens when all of them are there, most first; none that saves nothing."""
    used = uses(appended(old, pool), texts)[old.mask_id : old.mask_id + len(pool)]
    saved = used * np.array([max(candidate.parts - 1, 1) for candidate in pool], np.int64)
    order = np.argsort(-saved, kind="stable")[:count]
    return [pool[i] for i in order.tolist() if saved[i] > 0]


def appended(old: SentencePieceTokenizer, pieces: Sequence[Candidate]) -> SentencePieceTokenizer:
    """A model with pieces behind all of its own, whose ids stay; <mask> moves by their number."""
    proto = old.parsed()
    for candidate in pieces:
        proto.pieces.add(piece=candidate.piece, score=candidate.score, type=proto.SentencePiece.NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return SentencePieceTokenizer(proto.SerializeToString())


def uses(tokenizer: SentencePieceTokenizer, texts: Sequence[str]) -> np.ndarray:
    """How often each id stands in some texts, [vocab_size] int64."""
    counts = np.zeros(tokenizer.vocab_size, np.int64)
    for start in range(0, len(texts), _BATCH):
        for ids in tokenizer.encode_batch(texts[start : start + _BATCH]):
            counts += np.bincount(ids, minlength=len(counts))
    return counts


@dataclass(frozen=True)
class Change:
    """What another tokenizer does to the cut of some texts."""

    documents: int
    changed_documents: int
    tokens: int
    """Of the old cut."""
    changed_tokens: int
    """Of these, those that the new cut has not."""
    new_tokens: int
    """Of the new cut."""
    unknown: int
    """<unk> of the old cut."""
    new_unknown: int


def measure_change(
    old: SentencePieceTokenizer, new: SentencePieceTokenizer, source_V: np.ndarray, texts: Sequence[str]
) -> Change:
    """Compare the cuts of texts; source_V [new ids]: the old id of the same piece, -1 where there is none."""
    changed_documents = tokens = changed_tokens = new_tokens = unknown = new_unknown = 0
    for start in range(0, len(texts), _BATCH):
        batch = texts[start : start + _BATCH]
        for before, cut in zip(old.encode_batch(batch), new.encode_batch(batch), strict=True):
            after = source_V[cut]
            tokens, new_tokens = tokens + len(before), new_tokens + len(after)
            unknown += int((before == old.unk_id).sum())
            new_unknown += int((cut == new.unk_id).sum())
            if not np.array_equal(before, after):
                changed_documents += 1
                changed_tokens += _lost(before, after)
    return Change(len(texts), changed_documents, tokens, changed_tokens, new_tokens, unknown, new_unknown)


def _lost(before: np.ndarray, after: np.ndarray) -> int:
    """How many of a cut's tokens another one has not, wherever they stand."""
    ids, counts = np.unique(before, return_counts=True)
    others, again = np.unique(after, return_counts=True)
    kept = dict(zip(others.tolist(), again.tolist(), strict=True))
    return sum(max(0, n - kept.get(i, 0)) for i, n in zip(ids.tolist(), counts.tolist(), strict=True))
