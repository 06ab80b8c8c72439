"""The tokenizer: the Hub's ids, the same through transformers, and training that says what is wrong."""

import itertools
import json
import pickle
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from tests.corpora import SENTENCES
from xlscale.data.shards import Corpus
from xlscale.tokenizer import MODEL_FILE, SentencePieceTokenizer, sampled_texts, train_sentencepiece

MIXED = [
    "All human beings 人人生而自由 все люди",
    "  two  spaces\tand tabs\r\nand lines \u3000 ",
    "emoji 😀 👩‍👩‍👧 🇩🇪 👍🏽 ☺️ and unassigned \u0378 \U000e0fff \U0010ffff end",
    "Ａｌｌ ﬁ ½ ① ㌀ … ㄱ 각 각 e\u0301 ṩ",
    "x" * 5000,
    "自由" * 3000,
    "nothing known: ქართული ᏣᎳᎩ ⠃⠗⠇",
    "half \x00 control \x07 \x85 next \u2028 line \u200b zero \ufeff width \u00ad",
    "▁ metaspace ▁▁x ▁",
    "",
    " ",
]


def test_ids_are_those_of_the_hub(tiny_tokenizer: SentencePieceTokenizer) -> None:
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert tiny_tokenizer.vocab_size == 500
    assert [tiny_tokenizer.token(i) for i in (0, 1, 2, 3, 499)] == special
    assert tiny_tokenizer.special_ids == (0, 1, 2, 3, 499)
    assert not {tiny_tokenizer.token(i) for i in tiny_tokenizer.pieces} & set(special)


def test_decoding_gives_the_text_back(tiny_tokenizer: SentencePieceTokenizer) -> None:
    for text in SENTENCES.values():
        plain = " ".join(text.split())
        assert tiny_tokenizer.decode(tiny_tokenizer.encode(text)) == plain
    assert tiny_tokenizer.decode([0, 499, 2, 1]) == "<mask>"


def test_batches_encode_as_single_texts_at_any_number_of_threads(
    tiny_tokenizer: SentencePieceTokenizer,
) -> None:
    for threads in (1, 3):
        batch = tiny_tokenizer.encode_batch(MIXED, threads=threads)
        assert all(ids.dtype == np.int32 for ids in batch)
        assert [ids.tolist() for ids in batch] == [tiny_tokenizer.encode(text) for text in MIXED]
    assert tiny_tokenizer.encode_batch([]) == []


def test_literal_special_tokens_in_a_text_are_plain_characters(
    tiny_tokenizer: SentencePieceTokenizer,
) -> None:
    text = "a <mask> b<s>c </s> <pad><unk> <mask>"
    assert set(tiny_tokenizer.encode(text)) <= {*tiny_tokenizer.pieces, tiny_tokenizer.unk_id}


def random_texts(count: int) -> list[str]:
    """Texts from all of Unicode, half of each from what the tokenizer knows."""
    draw, known = (
        random.Random(0),
        [*"".join(SENTENCES.values()), " ", "\t", "\n", "\u0301", "ｱ", "ﬁ", "\x85", "😀"],
    )
    ranges = [(0x20, 0x250), (0x250, 0xD800), (0xE000, 0x110000)]
    texts = []
    for _ in range(count):
        characters = [
            draw.choice(known) if draw.random() < 0.5 else chr(draw.randrange(*draw.choice(ranges)))
            for _ in range(draw.choice([1, 3, 10, 40]))
        ]
        texts.append("".join(characters))
    return texts


def transformers_drops_a_mark(text: str) -> bool:
    """Whether a combining mark or joiner follows a mark or a character that is normalised to another.

    The tokenizers library then normalises the two as one and loses the second; SentencePiece keeps it.
    """

    def extends(character: str) -> bool:
        return unicodedata.category(character)[0] == "M" or character == "\u200d"

    return any(
        extends(after) and (extends(before) or before.isspace() or unicodedata.normalize("NFKC", before) != before)
        for before, after in itertools.pairwise(text)
    )


def test_transformers_gives_the_same_ids(tiny_tokenizer: SentencePieceTokenizer, tiny_tokenizer_folder: Path) -> None:
    from transformers import AutoTokenizer

    hub = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    texts = [
        *MIXED,
        *SENTENCES.values(),
        *(t for t in random_texts(2000) if not transformers_drops_a_mark(t)),
    ]
    assert len(texts) > 1500
    for text in texts:
        ours, theirs = tiny_tokenizer.encode(text), hub(text, add_special_tokens=False)["input_ids"]
        assert ours == theirs, ascii(text)
    a, b = tiny_tokenizer.encode("Alle Menschen"), tiny_tokenizer.encode("人人")
    assert hub("Alle Menschen")["input_ids"] == [0, *a, 2]
    assert hub("Alle Menschen", "人人")["input_ids"] == [0, *a, 2, 2, *b, 2]
    assert (hub.mask_token_id, hub.pad_token_id, hub.unk_token_id, len(hub)) == (499, 1, 3, 500)
    assert (hub.cls_token_id, hub.sep_token_id, hub.model_max_length) == (0, 2, 512)


def test_transformers_reads_a_literal_mask_as_the_mask(
    tiny_tokenizer: SentencePieceTokenizer, tiny_tokenizer_folder: Path
) -> None:
    from transformers import AutoTokenizer

    hub = AutoTokenizer.from_pretrained(tiny_tokenizer_folder)
    prompt = hub("Alle <mask> sind", add_special_tokens=False)["input_ids"]
    assert prompt == [*tiny_tokenizer.encode("Alle"), tiny_tokenizer.mask_id, *tiny_tokenizer.encode("sind")]
    assert hub.decode(prompt) == "Alle<mask> sind"


def test_tokenizer_json_alone_gives_the_same_ids(
    tiny_tokenizer: SentencePieceTokenizer, tiny_tokenizer_folder: Path
) -> None:
    # transformers 4 and xlm-roberta-xl without a tokenizer class take the pipeline from the file as it stands
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    for text in [*MIXED, *SENTENCES.values()]:
        assert file.encode(text, add_special_tokens=False).ids == tiny_tokenizer.encode(text), ascii(text)
        assert file.encode(text).ids == [0, *tiny_tokenizer.encode(text), 2]


def test_the_four_files_are_in_the_form_of_transformers_4(tiny_tokenizer_folder: Path) -> None:
    names = {path.name for path in tiny_tokenizer_folder.iterdir()}
    assert names == {MODEL_FILE, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    config = json.loads((tiny_tokenizer_folder / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "XLMRobertaTokenizer"
    assert config["added_tokens_decoder"]["499"]["lstrip"] is True
    assert {i: token["content"] for i, token in config["added_tokens_decoder"].items()} == {
        "0": "<s>", "1": "<pad>", "2": "</s>", "3": "<unk>", "499": "<mask>"
    }  # fmt: skip


def test_training_twice_gives_the_same_model(tiny_corpus: Corpus, tmp_path: Path) -> None:
    models = [
        train_sentencepiece(sampled_texts(tiny_corpus, 0.3, 30_000, seed=1), 400, tmp_path / name).model
        for name in ("a", "b")
    ]
    assert models[0] == models[1]


def test_training_text_is_sampled_by_language(tiny_corpus: Corpus) -> None:
    def share_of_hindi(alpha: float) -> float:
        texts = list(sampled_texts(tiny_corpus, alpha, 200_000, seed=0))
        total = sum(map(len, texts))
        assert 200_000 <= total < 210_000
        return sum(len(text) for text in texts if "\u0900" <= text[0] < "\u0980") / total

    characters = {code: sum(r.characters for r in tiny_corpus.records(code)) for code in tiny_corpus.languages}
    for alpha in (0.3, 1.0):
        expected = characters["hi_IN"] ** alpha / sum(n**alpha for n in characters.values())
        assert share_of_hindi(alpha) == pytest.approx(expected, abs=0.005)  # a document


def test_no_text_is_left_out_of_the_training_for_its_length(tmp_path: Path) -> None:
    # the rare word stands at the end of a line of 20 kB, past what the trainer would take
    words = SENTENCES["en_XX"].split()
    lines = [" ".join([*(words * 40)[:3000], *["zyzzyva"] * 40]), "自由" * 2000 + "奴隶" * 500]
    tokenizer = train_sentencepiece(lines, 90, tmp_path, character_coverage=1.0)
    for text in ("zyzzyva", "奴隶"):
        assert tokenizer.unk_id not in tokenizer.encode(text)


def test_a_model_that_cannot_have_the_hubs_ids_is_refused(tiny_tokenizer: SentencePieceTokenizer) -> None:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer.model)
    proto.pieces[50].piece = "<mask>"
    with pytest.raises(ValueError, match="'<mask>' is an ordinary piece"):
        SentencePieceTokenizer(proto.SerializeToString())
    proto = sentencepiece_model_pb2.ModelProto.FromString(tiny_tokenizer.model)
    proto.pieces[1].piece, proto.pieces[2].piece = "</s>", "<s>"
    with pytest.raises(ValueError, match=r"numbers <unk>, <s>, </s> \(0, 2, 1\)"):
        SentencePieceTokenizer(proto.SerializeToString())


def test_too_large_a_vocabulary_is_refused_with_the_largest_possible(tmp_path: Path) -> None:
    lines = SENTENCES["en_XX"].split(".") * 3
    with pytest.raises(ValueError, match=r"vocab_size=5000 .* the largest possible is (\d+)") as refused:
        train_sentencepiece(lines, 5000, tmp_path)
    largest = int(str(refused.value).split("largest possible is ")[1].split(";")[0])
    assert train_sentencepiece(lines, largest, tmp_path).vocab_size == largest
    with pytest.raises(ValueError, match="largest possible"):
        train_sentencepiece(lines, largest + 1, tmp_path)


def test_too_small_a_vocabulary_is_refused_with_the_smallest_possible(tmp_path: Path) -> None:
    lines = SENTENCES["zh_CN"].split("。")
    with pytest.raises(ValueError, match=r"vocab_size=20 .* the smallest possible is \d+"):
        train_sentencepiece(lines, 20, tmp_path, character_coverage=1.0)
    with pytest.raises(ValueError, match="vocab_size=5 must be at least"):
        train_sentencepiece(lines, 5, tmp_path)
    with pytest.raises(ValueError, match="every line is empty"):
        train_sentencepiece(["", "  \n "], 300, tmp_path)


def test_a_missing_or_damaged_tokenizer_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"sentencepiece\.bpe\.model: no tokenizer there; .* data\.tokenizer"):
        SentencePieceTokenizer.load(tmp_path)
    (tmp_path / MODEL_FILE).write_bytes(b"not a model")
    with pytest.raises(ValueError, match=r"sentencepiece\.bpe\.model: not a SentencePiece model"):
        SentencePieceTokenizer.load(tmp_path)


def test_a_pickled_tokenizer_is_the_same(tiny_tokenizer: SentencePieceTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tiny_tokenizer))
    assert copy.digest == tiny_tokenizer.digest
    assert copy.encode(MIXED[0]) == tiny_tokenizer.encode(MIXED[0])
