"""New pieces by themselves: how they are scored, what becomes of text, and which pieces they are like."""

import numpy as np
import pytest

from tests.vocabularies import PIECES, old_tokenizer, texts
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.vocabulary_pieces import Candidate, Cuts, appended, choose_pieces, learn_candidates, uses
from xlscale.vocabulary_vectors import Vectors, sparsemax


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceTokenizer:
    return old_tokenizer(tmp_path_factory.mktemp("old"))


def test_text_that_has_no_use_for_a_new_piece_is_cut_as_before(old: SentencePieceTokenizer) -> None:
    """Unknown characters too, whose score hangs on the lowest one of all pieces."""
    german = texts("de_DE", 60)
    choice = choose_pieces(old, learn_candidates(old, german, PIECES), german, PIECES)
    mixed = [f"{word} घ{word[::-1]}ऋ" for text in texts("en_XX", 60) + german for word in text.split()]
    changed = 0
    for before, after in zip(old.encode_batch(mixed), choice.tokenizer.encode_batch(mixed), strict=True):
        has_new = (after >= old.mask_id).any()
        assert has_new or np.array_equal(before, after)
        changed += int(has_new)
    assert 0 < changed < len(mixed)


def test_no_new_piece_lowers_the_score_of_unknown_characters(old: SentencePieceTokenizer) -> None:
    """<unk> is 10 below the lowest piece: were that to fall, "घa b c d" would beat "<unk> abcd"."""
    lowest = Cuts(old).lowest
    taught = appended(old, [Candidate("घa", lowest, 2), Candidate("abcd", -1.0, 4)])
    cut = taught.encode("घabcd")
    assert taught.unk_id in cut and "abcd" in map(taught.token, cut)
    candidates = learn_candidates(taught, texts("de_DE", 60), PIECES, discount=30.0)
    assert {candidate.score for candidate in candidates} == {lowest}
    assert appended(taught, candidates).encode("घabcd") == cut


def test_new_pieces_shorten_the_language_and_make_its_letters_known(old: SentencePieceTokenizer) -> None:
    hindi = texts("hi_IN", 40)
    choice = choose_pieces(old, learn_candidates(old, hindi, 120), hindi, 120)
    before, after = uses(old, hindi), uses(choice.tokenizer, hindi)
    assert before[old.unk_id] > 1000 and after[old.unk_id] == 0
    german = texts("de_DE", 60)
    choice = choose_pieces(old, learn_candidates(old, german, 80), german, 80)
    assert uses(choice.tokenizer, german).sum() < 0.5 * uses(old, german).sum()


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    draw = np.random.default_rng(0)
    for size in (1, 2, 5, 40):
        scores = draw.normal(size=size)
        weights = sparsemax(scores)
        assert weights.min() >= 0 and weights.sum() == pytest.approx(1)
        # Optimality: where there is weight, score - weight is the same, and elsewhere no more than that.
        rest = scores - weights
        level = rest[weights > 0]
        assert np.ptp(level) < 1e-12 and (rest <= level[0] + 1e-12).all()


def test_a_piece_is_a_mixture_of_those_in_its_places() -> None:
    """Two kinds of sentences; of each kind a known and a new piece stand in the same place."""
    draw = np.random.default_rng(0)
    nouns, verbs = {"known": 10, "new": 20}, {"known": 11, "new": 21}
    sentences = []
    for _ in range(400):
        kind = draw.integers(2)
        word = (nouns, verbs)[kind][("known", "new")[draw.integers(2)]]
        sentences.append(np.array([12 + kind, 14 + kind, word, 16 + kind, 18 + kind]))
    vectors = Vectors(sentences, range(4, 30), 31)
    found = vectors.mixtures(np.array([20, 21, 22]), np.array([10, 11]))
    assert sorted(found) == [20, 21], "22 is in no text"
    for new, known in ((20, 10), (21, 11)):
        ids, weights = found[new]
        assert dict(zip(ids.tolist(), weights.tolist(), strict=True)).get(known, 0) > 0.9


def test_no_window_reaches_from_one_text_into_the_next() -> None:
    draw = np.random.default_rng(0)
    cuts = [draw.integers(4, 20, size=draw.integers(1, 9)) for _ in range(100)]
    one, other = (Vectors(order, range(4, 20), 21).vectors_PD for order in (cuts, cuts[::-1]))
    assert np.array_equal(one, other) and np.ptp(one) > 0.5
