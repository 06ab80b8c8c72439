"""Which old rows make up that of a new piece: those of pieces like it, or else of its old cut."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.vocabulary_pieces import Cuts
from xlscale.vocabulary_rows import NEW, Mixture, ids_by_piece
from xlscale.vocabulary_vectors import Vectors


@dataclass(frozen=True)
class Mixtures:
    """A mixture for each new piece, but for those that get the mean of all, and how many there are of each kind."""

    of: dict[int, Mixture]
    kinds: Counter[str] = field(default_factory=Counter)


def mixtures_of(
    old: SentencePieceTokenizer,
    new: SentencePieceTokenizer,
    source_V: np.ndarray,
    texts: Sequence[str] = (),
    likeness: bool = True,
) -> Mixtures:
    """Of pieces that stand often enough in `texts` those like them; of the others, or all, the mean of their old cut.

    source_V: see vocabulary_rows.sources. A piece with an unknown character has no old cut, and none here.
    """
    wanted = np.flatnonzero(source_V == NEW)
    cuts = new.encode_batch(texts)
    parts: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    if likeness and cuts:
        both = np.array([i for i in new.pieces if source_V[i] != NEW], np.int64)
        found = Vectors(cuts, new.pieces, new.vocab_size).mixtures(wanted, both)
        parts = {i: (source_V[ids], weights) for i, (ids, weights) in found.items()}
    kinds = Counter({"mixtures of pieces like them": len(parts)})
    rest, old_ids = [i for i in wanted.tolist() if i not in parts], ids_by_piece(old)
    for token_id, cut in zip(rest, Cuts(old).cut([new.token(i) for i in rest]), strict=True):
        if all(piece in old_ids for piece in cut):
            parts[token_id] = np.array([old_ids[piece] for piece in cut]), np.full(len(cut), 1 / len(cut))
            kinds["means of their old cut"] += 1
        else:
            kinds["means of all pieces"] += 1
    shifts = _shifts(cuts, parts, source_V, old.vocab_size)
    return Mixtures({i: Mixture(*parts[i], shifts.get(i, 0.0)) for i in parts}, +kinds)


def _shifts(
    cuts: Sequence[np.ndarray], parts: dict[int, tuple[np.ndarray, np.ndarray]], source_V: np.ndarray, old_ids: int
) -> dict[int, float]:
    """By how much the log frequency of a new piece in the texts is above that of its parts, where all of them occur.

    A tied model keeps frequencies in the bias, and those of the parts are other languages'.
    """
    counts = np.zeros(len(source_V), np.int64)
    for ids in cuts:
        counts += np.bincount(ids, minlength=len(counts))
    of_old = np.zeros(old_ids, np.int64)
    stay = source_V != NEW
    of_old[source_V[stay]] = counts[stay]
    return {
        token_id: float(np.log(counts[token_id]) - weights @ np.log(of_old[ids]))
        for token_id, (ids, weights) in parts.items()
        if counts[token_id] and of_old[ids].all()
    }
