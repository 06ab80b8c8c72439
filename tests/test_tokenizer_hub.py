"""What both kinds of tokenizer have in common: batches, literals, templates, sampled cuts, files."""

import itertools
import math
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.corpora import DOCUMENTS, SENTENCES, documents
from tests.test_tokenizer import MIXED
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.tokenizer_bpe import ByteLevelBPETokenizer, load_tokenizer, train_bpe
from xlscale.tokenizer_hub import HubTokenizer

TEXTS = [*MIXED, *SENTENCES.values(), "a <mask> b<s>c </s> <pad><unk>\u3000 <mask>"]


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    train_bpe((d["text"] for code, count in DOCUMENTS.items() for d in documents(code, count)), 800, folder)
    return folder


@pytest.fixture(params=["sentencepiece", "bpe"])
def folder(request: pytest.FixtureRequest, tiny_tokenizer_folder: Path, bpe_folder: Path) -> Path:
    return tiny_tokenizer_folder if request.param == "sentencepiece" else bpe_folder


@pytest.fixture
def tokenizer(folder: Path) -> HubTokenizer:
    return load_tokenizer(folder)


@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_batches_encode_as_single_texts_at_any_number_of_threads(
    tokenizer: HubTokenizer, split_special_tokens: bool
) -> None:
    for threads in (1, 2, 5):
        batch = tokenizer.encode_batch(TEXTS, threads, split_special_tokens=split_special_tokens)
        assert all(ids.dtype == np.int32 for ids in batch)
        alone = [tokenizer.encode(text, split_special_tokens=split_special_tokens) for text in TEXTS]
        assert [ids.tolist() for ids in batch] == alone
    assert tokenizer.encode_batch([]) == []


def test_a_literal_is_plain_unless_it_is_asked_for_and_the_mask_takes_the_space_before_it(
    tokenizer: HubTokenizer,
) -> None:
    text = "Alle \u3000<mask> sind</s><MASK>"
    assert not {*tokenizer.encode(text)} & {tokenizer.mask_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    parts = [tokenizer.encode(part) for part in ("Alle", " sind", "<MASK>")]
    prompt = [*parts[0], tokenizer.mask_id, *parts[1], tokenizer.eos_id, *parts[2]]
    assert tokenizer.encode(text, split_special_tokens=False) == prompt
    assert tokenizer.encode("<mask>", split_special_tokens=False) == [tokenizer.mask_id]


def test_templates_masks_and_types_are_as_long_as_each_other(tokenizer: HubTokenizer) -> None:
    a, b = tokenizer.encode("Alle Menschen"), tokenizer.encode("人人")
    pair = tokenizer.build_inputs_with_special_tokens(a, b)
    assert tokenizer.build_inputs_with_special_tokens(a) == [0, *a, 2]
    assert pair == [0, *a, 2, 2, *b, 2]
    for given in ([a], [a, b], [[]], [[], []]):
        whole = tokenizer.build_inputs_with_special_tokens(*given)
        mask = tokenizer.get_special_tokens_mask(*given)
        assert [i for i, m in zip(whole, mask, strict=True) if not m] == [i for ids in given for i in ids]
        assert tokenizer.create_token_type_ids_from_sequences(*given) == [0] * len(whole)
        assert tokenizer.get_special_tokens_mask(whole, already_has_special_tokens=True) == mask
    known = [tokenizer.mask_id, tokenizer.unk_id, tokenizer.pad_id, *a[:1]]
    assert tokenizer.get_special_tokens_mask(known, already_has_special_tokens=True) == [1, 1, 1, 0]
    with pytest.raises(ValueError, match="give the whole sequence as ids_0"):
        tokenizer.get_special_tokens_mask(a, b, already_has_special_tokens=True)


def test_the_vocabulary_is_saved_alone_with_a_prefix_too(tokenizer: HubTokenizer, folder: Path, tmp_path: Path) -> None:
    for prefix in (None, "old"):
        paths = [Path(path) for path in tokenizer.save_vocabulary(tmp_path / "v", prefix)]
        assert paths and all(path.parent == tmp_path / "v" for path in paths)
        for path in paths:
            name = path.name.removeprefix("old-") if prefix else path.name
            assert (name == path.name) == (prefix is None)
            assert path.read_bytes() == (folder / name).read_bytes()
    assert load_tokenizer(tmp_path / "v").digest == tokenizer.digest


def test_sampled_cuts_differ_spell_the_text_and_are_the_same_in_another_process(
    tokenizer: HubTokenizer, folder: Path
) -> None:
    text = SENTENCES["en_XX"].strip()
    best = tokenizer.encode(text)
    cuts = [tokenizer.encode(text, enable_sampling=True, alpha=0.2, seed=seed) for seed in range(5)]
    assert len({*map(tuple, cuts), tuple(best)}) == 6
    for cut in cuts:
        assert tokenizer.decode(cut).split() == text.split()
    batch = tokenizer.encode_batch([text] * 4, 2, enable_sampling=True, alpha=0.2, seed=3)
    assert len({tuple(ids.tolist()) for ids in batch}) == 4, "texts of a batch are drawn apart"
    assert batch[0].tolist() == cuts[3]
    code = (
        "import sys; from xlscale.tokenizer_bpe import load_tokenizer\n"
        "print(load_tokenizer(sys.argv[1]).encode(sys.argv[2], enable_sampling=True, alpha=0.2, seed=3))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder, text], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == str(cuts[3]), done.stderr


def test_sampling_leaves_literals_whole(tokenizer: HubTokenizer) -> None:
    text = "Alle <mask> Menschen <mask>"
    options = {"enable_sampling": True, "alpha": 0.1}
    for seed in range(5):
        ids = tokenizer.encode(text, seed=seed, split_special_tokens=False, **options)
        assert ids.count(tokenizer.mask_id) == 2
        assert tokenizer.mask_id not in tokenizer.encode(text, seed=seed, **options)
    for text in ("", " ", "\u200b", "ქართული \u0378"):
        assert tokenizer.encode(text, **options) is not None


def frequencies(tokenizer: HubTokenizer, text: str, count: int, **options: float) -> dict[tuple[int, ...], float]:
    drawn = tokenizer.encode_batch([text] * count, enable_sampling=True, **options)
    return {cut: n / count for cut, n in Counter(tuple(ids.tolist()) for ids in drawn).items()}


@pytest.mark.parametrize(("nbest_size", "alpha"), [(-1, 0.1), (-1, 0.5), (4, 0.05), (-1, 0.0)])
def test_sentencepiece_draws_a_cut_with_its_probability_to_the_alpha(
    tiny_tokenizer: SentencePieceTokenizer, nbest_size: int, alpha: float
) -> None:
    """Against all cuts, spelt out one by one; the library's scores are the measure."""
    processor, word = tiny_tokenizer._processor, "Menschen \u0378\u0379"
    text = processor.normalize(word)
    scores = {processor.id_to_piece(i): processor.get_score(i) for i in range(3, processor.get_piece_size())}
    unknown = min(scores.values()) - 10
    weights: dict[tuple[int, ...], float] = {}
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *ends, len(text)])]
        if all(piece in scores or (len(piece) == 1 and piece not in scores) for piece in pieces):
            ids = [processor.piece_to_id(piece) for piece in pieces]
            fused = [i for i, _ in itertools.groupby(ids)] if 0 in ids else ids
            total = sum(scores.get(piece, unknown) for piece in pieces)
            weights[tuple(3 if i == 0 else i + 1 for i in fused)] = total
    best = sorted(weights.values(), reverse=True)[: nbest_size if nbest_size > 0 else None]
    weights = {cut: math.exp(alpha * (total - best[0])) for cut, total in weights.items() if total >= best[-1]}
    expected = {cut: weight / sum(weights.values()) for cut, weight in weights.items()}
    assert len(expected) > 2
    count = 4000
    found = frequencies(tiny_tokenizer, word, count, nbest_size=nbest_size, alpha=alpha)
    assert found.keys() <= expected.keys()
    for cut, p in expected.items():  # five standard deviations
        assert abs(found.get(cut, 0) - p) <= 5 * math.sqrt(p * (1 - p) / count), cut


def test_bpe_dropout_goes_from_the_whole_merges_to_none(bpe_folder: Path) -> None:
    tokenizer = ByteLevelBPETokenizer.load(bpe_folder)
    for text in TEXTS:
        assert tokenizer.encode(text, enable_sampling=True, alpha=0.0) == tokenizer.encode(text), ascii(text)
        dropped = tokenizer.encode(text, enable_sampling=True, alpha=1.0)
        assert len(dropped) == len(text.encode("utf-8")), "nothing is merged: a token is a byte"
    text = SENTENCES["de_DE"]
    lengths = [len(tokenizer.encode(text, enable_sampling=True, alpha=a)) for a in (0.0, 0.1, 0.5, 0.9, 1.0)]
    assert lengths == sorted(set(lengths))


def test_bpe_dropout_drops_a_merge_with_probability_alpha(bpe_folder: Path) -> None:
    """A word that one merge makes: left in two with probability alpha."""
    tokenizer = ByteLevelBPETokenizer.load(bpe_folder)
    word = next(a + b for a, b in tokenizer._merges if (a + b).isascii() and len(a + b) == 2)
    count, alpha = 4000, 0.3
    found = frequencies(tokenizer, word, count, alpha=alpha)
    assert found.keys() == {(tokenizer._ids[word],), tuple(tokenizer._ids[c] for c in word)}
    assert abs(found[tuple(tokenizer._ids[c] for c in word)] - alpha) < 5 * math.sqrt(alpha * (1 - alpha) / count)


def test_settings_that_cannot_be_sampled_by_are_refused(
    tiny_tokenizer: SentencePieceTokenizer, bpe_folder: Path
) -> None:
    bpe = ByteLevelBPETokenizer.load(bpe_folder)
    for tokenizer, options, line in (
        (tiny_tokenizer, {"nbest_size": 1}, "nbest_size=1 must be -1, for all cuts, or 2 to 512"),
        (tiny_tokenizer, {"nbest_size": 513}, "nbest_size=513 must be"),
        (tiny_tokenizer, {"alpha": -0.1}, "alpha=-0.1 must be 0 or more"),
        (bpe, {"nbest_size": 5}, "nbest_size=5 has no meaning for BPE"),
        (bpe, {"alpha": 1.5}, "alpha=1.5 is the share of merges"),
    ):
        with pytest.raises(ValueError, match=line):
            tokenizer.encode("a", enable_sampling=True, **options)


def test_no_text_places_a_special_token(tokenizer: HubTokenizer) -> None:
    draw = random.Random(0)
    allowed = {*tokenizer.pieces, tokenizer.unk_id}
    for _ in range(300):
        text = "".join(draw.choices(["<s>", "</s>", "<pad>", "<unk>", "<mask>", "<", ">", " ", "s", "mask", "▁"], k=12))
        assert set(tokenizer.encode(text)) <= allowed
        assert set(tokenizer.encode(text, enable_sampling=True, alpha=0.1)) <= allowed
