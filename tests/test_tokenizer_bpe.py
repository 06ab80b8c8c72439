"""Byte-level BPE: ids in the Hub's order, every text spelt and read back, training that no literal can poison."""

import json
import pickle
from pathlib import Path

import pytest

from tests.corpora import DOCUMENTS, SENTENCES, documents
from tests.test_tokenizer import MIXED, random_texts
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.tokenizer_bpe import ByteLevelBPETokenizer, load_tokenizer, train_bpe
from xlscale.tokenizer_hub import SPECIAL_TOKENS

LINES = [document["text"] for code, count in DOCUMENTS.items() for document in documents(code, count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    train_bpe(LINES, 800, path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ByteLevelBPETokenizer:
    return ByteLevelBPETokenizer.load(folder)


def test_ids_are_those_of_the_hub(tokenizer: ByteLevelBPETokenizer) -> None:
    assert tokenizer.vocab_size == 800
    assert [tokenizer.token(i) for i in (0, 1, 2, 3, 799)] == list(SPECIAL_TOKENS)
    assert tokenizer.special_ids == (0, 1, 2, 3, 799)
    assert tokenizer.pieces == range(4, 799)
    for bad in (-1, 800):
        with pytest.raises(ValueError, match=rf"token id {bad} is not below vocab_size=800"):
            tokenizer.token(bad)


def test_every_text_is_spelt_and_read_back(tokenizer: ByteLevelBPETokenizer) -> None:
    for text in [*MIXED, *SENTENCES.values(), *random_texts(500), "a <mask> b<s>c </s> <pad><unk> <mask>"]:
        ids = tokenizer.encode(text)
        assert set(ids) <= set(tokenizer.pieces)
        assert tokenizer.decode(tokenizer.build_inputs_with_special_tokens(ids)) == text


def test_half_a_character_reads_as_the_replacement_character(tokenizer: ByteLevelBPETokenizer) -> None:
    ids = tokenizer.encode("\u0378")
    assert len(ids) == 2 and tokenizer.decode(ids[:1]) == "\ufffd"
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([tokenizer.mask_id, tokenizer.pad_id]) == "<mask>"


def test_training_twice_gives_the_same_files(folder: Path, tmp_path: Path) -> None:
    train_bpe(iter(LINES), 800, tmp_path)
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
    }  # fmt: skip
    for name in names:
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name


def test_literal_special_tokens_in_the_training_text_become_no_special_ids(tmp_path: Path) -> None:
    lines = ["<s> <mask></s><pad> <unk> <mask>x<s>" for _ in range(500)]
    tokenizer = train_bpe(lines, 270, tmp_path)
    assert set(tokenizer.encode(lines[0])) <= set(tokenizer.pieces)
    assert tokenizer.decode(tokenizer.encode(lines[0])) == lines[0]
    assert [tokenizer.token(i) for i in tokenizer.special_ids] == list(SPECIAL_TOKENS)


def test_a_size_that_the_text_does_not_yield_is_refused_with_the_largest_possible(tmp_path: Path) -> None:
    lines = SENTENCES["en_XX"].split(".")
    with pytest.raises(ValueError, match=r"vocab_size=5000 is more .* the largest possible is \d+") as refused:
        train_bpe(lines, 5000, tmp_path)
    largest = int(str(refused.value).split("largest possible is ")[1].split(";")[0])
    assert train_bpe(lines, largest, tmp_path).vocab_size == largest
    with pytest.raises(ValueError, match="largest possible"):
        train_bpe(lines, largest + 1, tmp_path)
    with pytest.raises(ValueError, match="vocab_size=260 must be at least 261"):
        train_bpe(lines, 260, tmp_path)
    with pytest.raises(ValueError, match="every line is empty"):
        train_bpe(["", ""], 300, tmp_path)


def test_a_vocabulary_with_the_mask_in_front_is_read_by_its_own_ids(folder: Path, tmp_path: Path) -> None:
    """As the tokenizers library's own trainer makes them; and RoBERTa's pads behind the last piece."""
    tokens = sorted(json.loads((folder / "vocab.json").read_text()).items(), key=lambda item: item[1])
    pieces = [token for token, _ in tokens[4:-1]]
    order = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *pieces, "<|endoftext|>", "madeupword0000"]
    (tmp_path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(order)}))
    (tmp_path / "merges.txt").write_bytes((folder / "merges.txt").read_bytes())
    tokenizer = ByteLevelBPETokenizer.load(tmp_path)
    assert (tokenizer.mask_id, tokenizer.vocab_size) == (4, 802)
    assert tokenizer.pieces == range(5, 800), "nothing that no text gives is drawn as a random token"
    first = ByteLevelBPETokenizer.load(folder)
    assert tokenizer.encode(MIXED[0]) == [i + 1 for i in first.encode(MIXED[0])]


def change(folder: Path, tmp_path: Path, name: str, before: str, after: str) -> Path:
    """A copy of a folder's vocabulary with one thing changed."""
    for file in ("vocab.json", "merges.txt"):
        text = (folder / file).read_text(encoding="utf-8")
        if file == name:
            assert before in text
            text = text.replace(before, after, 1)
        (tmp_path / file).write_text(text, encoding="utf-8")
    return tmp_path


BAD = {
    "no JSON": ("vocab.json", "{", "[", "vocab.json is not a vocabulary"),
    "id twice": ("vocab.json", '"<pad>": 1', '"<pad>": 2', "does not give each of its tokens an id of its own"),
    "no mask": ("vocab.json", '"<mask>"', '"<Mask>"', r"lacks \['<mask>'\]"),
    "no byte": ("vocab.json", '"!"', '"!!!"', r"lacks \['!'\]"),
    "piece not there": (
        "merges.txt",
        "#version: 0.2\n",
        "#version: 0.2\n! <\n",
        "line 2: '! <' is no merge of two tokens",
    ),
    "three parts": ("merges.txt", "#version: 0.2\n", "#version: 0.2\na b c\n", "line 2: 'a b c' is no merge"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_vocabulary_is_refused_with_one_clear_line(folder: Path, tmp_path: Path, case: str) -> None:
    *where, line = BAD[case]
    with pytest.raises(ValueError, match=line) as refused:
        ByteLevelBPETokenizer.load(change(folder, tmp_path, *where))
    assert str(refused.value).startswith(f"{tmp_path}: ") and "\n" not in str(refused.value)


def test_merges_that_make_a_special_token_and_special_tokens_amid_the_pieces_are_refused(folder: Path) -> None:
    ids = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8")
    more = {**ids, "<s": 800}
    with pytest.raises(ValueError, match=r"line \d+: '<s >' makes a special token of plain text"):
        ByteLevelBPETokenizer(json.dumps(more).encode(), f"{merges}< s\n<s >\n".encode())
    ids["<mask>"], ids["!"] = ids["!"], ids["<mask>"]
    ids["<unk>"], ids['"'] = ids['"'], ids["<unk>"]
    with pytest.raises(ValueError, match=r"\['<unk>', '<mask>'\] stand between the pieces"):
        ByteLevelBPETokenizer(json.dumps(ids).encode(), merges.encode())


def test_the_kind_of_a_folder_is_read_off_its_files(folder: Path, tiny_tokenizer_folder: Path, tmp_path: Path) -> None:
    assert isinstance(load_tokenizer(folder), ByteLevelBPETokenizer)
    assert isinstance(load_tokenizer(tiny_tokenizer_folder), SentencePieceTokenizer)
    with pytest.raises(ValueError, match=r"sentencepiece\.bpe\.model: no tokenizer there"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no tokenizer there: \['merges.txt'\] and tokenizer.json do not exist"):
        load_tokenizer(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "tokenizer.json").write_bytes((tiny_tokenizer_folder / "tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
    with pytest.raises(ValueError, match=r"holds a Unigram model, not BPE; another kind needs sentencepiece.bpe.model"):
        ByteLevelBPETokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    assert isinstance(load_tokenizer(tmp_path), ByteLevelBPETokenizer)
    with pytest.raises(ValueError, match=r"holds a BPE model, not Unigram; another kind needs vocab.json"):
        SentencePieceTokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is no tokenizer \(KeyError"):
        load_tokenizer(tmp_path)


def test_a_pickled_tokenizer_is_the_same(tokenizer: ByteLevelBPETokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.digest == tokenizer.digest
    assert copy.encode(MIXED[0]) == tokenizer.encode(MIXED[0])
