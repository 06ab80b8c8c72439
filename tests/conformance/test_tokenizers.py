"""Ids of both kinds of tokenizer against transformers 4.56.2, its slow and its fast classes, and 5.23.0.

transformers takes a literal special token in a text for the token; split_special_tokens makes it plain there too.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.test_masked_lm import CASES, ours, written
from tests.conformance.versions import NEW, OLD, Reference, both_versions
from tests.corpora import DOCUMENTS, SENTENCES, documents
from tests.test_tokenizer import MIXED, random_texts, transformers_drops_a_mark
from xlscale.tokenizer_bpe import ByteLevelBPETokenizer, load_tokenizer, train_bpe
from xlscale.tokenizer_hub import SPECIAL_TOKENS, HubTokenizer

References = Callable[[str], Reference]
# Every way to read our folder: (version, class, options).
READERS = {
    "sentencepiece": {
        "4.56.2 slow": (OLD, "XLMRobertaTokenizer", {}),
        "4.56.2 fast": (OLD, "XLMRobertaTokenizerFast", {}),
        "4.56.2 auto": (OLD, "AutoTokenizer", {}),
        "4.56.2 auto slow": (OLD, "AutoTokenizer", {"use_fast": False}),
        "5.23.0": (NEW, "XLMRobertaTokenizer", {}),
        "5.23.0 auto": (NEW, "AutoTokenizer", {}),
    },
    "bpe": {
        "4.56.2 slow": (OLD, "RobertaTokenizer", {}),
        "4.56.2 fast": (OLD, "RobertaTokenizerFast", {}),
        "4.56.2 auto": (OLD, "AutoTokenizer", {}),
        "4.56.2 auto slow": (OLD, "AutoTokenizer", {"use_fast": False}),
        "5.23.0": (NEW, "RobertaTokenizer", {}),
        "5.23.0 auto": (NEW, "AutoTokenizer", {}),
    },
}
every_reader = pytest.mark.parametrize(
    ("kind", "reader"), [(kind, reader) for kind, readers in READERS.items() for reader in readers]
)
LITERALS = [
    "a <mask> b<s>c </s> <pad><unk> <mask>",
    "<mask>",
    " <mask> <mask><mask>  ",
    "<s><s> </s>",
    "自由\u3000<mask>自由\xa0<mask>\u200b<mask>\n",
    "<<mask>> <mask <s > </ s> <MASK> <mask>mask<mask>",
    "x" * 300 + "<mask>" + "😀" * 100,
]


def mixed_texts(count: int) -> list[str]:
    """Known words and characters of all of Unicode, with literal special tokens among them."""
    draw = random.Random(1)
    texts = []
    for text in random_texts(count):
        words = draw.choices([*draw.choice(list(SENTENCES.values())).split(), *SPECIAL_TOKENS], k=5)
        texts.append(draw.choice(["", " ", "  "]).join([*words[:2], text, *words[2:]]))
    return texts


@pytest.fixture(scope="session")
def folders(tiny_tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, of the same text."""
    bpe = tmp_path_factory.mktemp("bpe")
    train_bpe((d["text"] for code, count in DOCUMENTS.items() for d in documents(code, count)), 800, bpe)
    return {"sentencepiece": tiny_tokenizer_folder, "bpe": bpe}


def comparable(text: str, kind: str, reader: str, split: bool) -> bool:
    """Whether the readers of transformers agree on a text, so that there is something to be equal to."""
    if kind == "bpe":
        return True
    if "slow" in reader:
        # It leaves the next-line character to SentencePiece, and strips what only Python takes for white space.
        return not any(c in text for c in "\x85\x1c\x1d\x1e\x1f")
    # The fast pipeline loses some marks, and has the special tokens among its pieces: it finds them in plain text too.
    return not transformers_drops_a_mark(text) and not (split and any(token in text for token in SPECIAL_TOKENS))


@every_reader
@pytest.mark.parametrize("split", [True, False], ids=["literals plain", "literals tokens"])
def test_ids_are_those_of_transformers(
    reference: References, folders: dict[str, Path], kind: str, reader: str, split: bool
) -> None:
    version, name, options = READERS[kind][reader]
    texts = [*MIXED, *SENTENCES.values(), *LITERALS, *mixed_texts(1500)]
    texts = [text for text in texts if comparable(text, kind, reader, split)]
    assert len(texts) > 700
    call = {"add_special_tokens": False, "split_special_tokens": split}
    theirs = reference(version).encode(folders[kind], texts, name, options, **call)
    our_ids = load_tokenizer(folders[kind]).encode_batch(texts, split_special_tokens=split)
    for text, found, expected in zip(texts, our_ids, theirs, strict=True):
        assert found.tolist() == expected, ascii(text)


@every_reader
def test_templates_are_those_of_transformers(
    reference: References, folders: dict[str, Path], kind: str, reader: str
) -> None:
    version, name, options = READERS[kind][reader]
    tokenizer = load_tokenizer(folders[kind])
    a, b = SENTENCES["de_DE"].strip(), SENTENCES["zh_CN"].strip()
    ids_a, ids_b = tokenizer.encode(a), tokenizer.encode(b)
    single, pair = reference(version).encode(folders[kind], [a, [a, b]], name, options)
    assert tokenizer.build_inputs_with_special_tokens(ids_a) == single
    assert tokenizer.build_inputs_with_special_tokens(ids_a, ids_b) == pair


@every_reader
def test_masks_types_decoding_and_ids_are_those_of_transformers(
    reference: References, folders: dict[str, Path], kind: str, reader: str
) -> None:
    version, name, options = READERS[kind][reader]
    tokenizer = load_tokenizer(folders[kind])
    a, b = tokenizer.encode(SENTENCES["hi_IN"].strip()), tokenizer.encode("ja \u0905 Leben")
    whole = [*tokenizer.build_inputs_with_special_tokens(a, b), tokenizer.mask_id, tokenizer.unk_id, tokenizer.pad_id]
    calls: list[list[Any]] = [["get_special_tokens_mask", whole, None, True], ["decode", a]]
    if version == OLD:  # 5.x has these no more
        calls += [["build_inputs_with_special_tokens", a], ["build_inputs_with_special_tokens", a, b]]
        calls += [["create_token_type_ids_from_sequences", a], ["create_token_type_ids_from_sequences", a, b]]
    if "slow" in reader:  # the fast classes refuse it
        calls += [["get_special_tokens_mask", a], ["get_special_tokens_mask", a, b]]
    expected = [getattr(tokenizer, method)(*arguments) for method, *arguments in calls]
    special = ["bos_token_id", "pad_token_id", "eos_token_id", "unk_token_id", "mask_token_id"]
    theirs = reference(version).ask(
        "tokenizer_calls", kind=name, folder=str(folders[kind]), options=options,
        calls=[*calls, *([attribute] for attribute in [*special, "model_max_length"])],
    )  # fmt: skip
    assert theirs[: len(calls)] == expected
    assert theirs[len(calls) :] == [
        tokenizer.bos_id,
        tokenizer.pad_id,
        tokenizer.eos_id,
        tokenizer.unk_id,
        tokenizer.mask_id,
        512,
    ]


@both_versions
@pytest.mark.parametrize(("kind", "name"), [("bpe", "RobertaTokenizer"), ("sentencepiece", "XLMRobertaTokenizer")])
def test_folder_that_transformers_saved_gives_us_the_same_ids(
    reference: References, folders: dict[str, Path], version: str, kind: str, name: str, tmp_path: Path
) -> None:
    """Their files, not ours: other order and indent; 5.x writes tokenizer.json in place of the vocabulary."""
    args = {"kind": name, "folder": str(folders[kind]), "options": {}}
    reference(version).ask("tokenizer_calls", calls=[["save_pretrained", str(tmp_path)]], **args)
    assert (tmp_path / "tokenizer.json").exists() == (version == NEW)
    theirs, mine = load_tokenizer(tmp_path), load_tokenizer(folders[kind])
    if kind == "bpe":
        assert theirs.digest == mine.digest
    assert (theirs.special_ids, theirs.pieces, theirs.vocab_size) == (mine.special_ids, mine.pieces, mine.vocab_size)
    texts = [*MIXED, *SENTENCES.values(), *random_texts(300)]
    assert list(map(theirs.encode, texts)) == list(map(mine.encode, texts))
    # And what only 5.x reads becomes what 4.56 reads too.
    theirs.save(tmp_path / "both")
    ids = reference(OLD).encode(tmp_path / "both", texts[:3], name, add_special_tokens=False)
    assert ids == [mine.encode(text) for text in texts[:3]]


@both_versions
@pytest.mark.parametrize(
    ("case", "kind"), [("roberta", "bpe"), ("xlm-roberta", "sentencepiece"), ("xlm-roberta-xl", "sentencepiece")]
)
def test_folder_of_a_model_brings_its_tokenizer(
    reference: References, folders: dict[str, Path], version: str, case: str, kind: str, tmp_path: Path
) -> None:
    folder = written(ours(case), case, tmp_path / "hub", tokenizer_folder=folders[kind])
    tokenizer = load_tokenizer(folder)
    for options in [{}, {"use_fast": False}] if version == OLD else [{}]:
        theirs = reference(version).encode(folder, MIXED[:2], "AutoTokenizer", options)
        assert theirs == [tokenizer.build_inputs_with_special_tokens(tokenizer.encode(text)) for text in MIXED[:2]]
        length = reference(version).ask(
            "tokenizer_calls", kind="AutoTokenizer", folder=str(folder), options=options, calls=[["model_max_length"]]
        )
        assert length == [CASES[case].max_position_embeddings - CASES[case].pad_token_id - 1]


def test_add_prefix_space_is_honoured_on_both_sides(
    reference: References, folders: dict[str, Path], tmp_path: Path
) -> None:
    source = ByteLevelBPETokenizer.load(folders["bpe"])
    tokenizer = ByteLevelBPETokenizer(*source._vocabulary_files().values(), add_prefix_space=True)
    tokenizer.save(tmp_path)
    again: HubTokenizer = load_tokenizer(tmp_path)
    texts = ["Alle Menschen", " Alle", "😀", ""]
    assert again.encode(texts[0]) == source.encode(f" {texts[0]}") != source.encode(texts[0])
    assert again.digest == tokenizer.digest != source.digest
    for version, name in ((OLD, "RobertaTokenizer"), (OLD, "RobertaTokenizerFast"), (NEW, "AutoTokenizer")):
        theirs = reference(version).encode(tmp_path, texts, name, add_special_tokens=False)
        assert theirs == [again.encode(text) for text in texts], (version, name)
