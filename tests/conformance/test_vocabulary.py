"""Folders with new pieces in both versions of transformers: nothing to report, our ids, our logits."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.conformance.test_tokenizers import READERS, comparable
from tests.conformance.versions import Reference, both_versions
from tests.corpora import DOCUMENTS, SENTENCES, documents, write_shards
from tests.hub_folders import FAMILIES, noisy
from tests.test_tokenizer import MIXED, random_texts
from xlscale.checkpoint.pretrained import load_pretrained, save_pretrained
from xlscale.config_sections import ModelConfig
from xlscale.extend_vocabulary import VocabularyChanges, extend_vocabulary
from xlscale.tokenizer import SentencePieceTokenizer, train_sentencepiece

References = Callable[[str], Reference]
PIECES = 40
CLASSES = {"xlm-roberta": "XLMRobertaForMaskedLM", "xl": "XLMRobertaXLForMaskedLM", "xmod": "XmodForMaskedLM"}
ROWS = 248


@pytest.fixture(scope="session")
def extended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family whose tokenizer had neither Hindi's letters nor German, and got pieces of both."""
    base = tmp_path_factory.mktemp("vocabulary")
    old_text = [d["text"] for code in ("en_XX", "ru_RU", "zh_CN") for d in documents(code, DOCUMENTS[code])]
    train_sentencepiece(old_text, 200, base / "tokenizer", character_coverage=1.0)
    for code in ("hi_IN", "de_DE"):
        write_shards(base / "shards", code, 60)
    folders = {}
    for family in CLASSES:
        values = {**vars(FAMILIES[family]), "vocab_size": ROWS, "max_position_embeddings": 66}
        folder = save_pretrained(noisy(ModelConfig(**values)), base / family, base / "tokenizer")
        for code in ("hi_IN", "de_DE"):
            changes = VocabularyChanges(corpus=base / "shards", language=code, pieces=PIECES)
            folder = extend_vocabulary(folder, base / f"{family}-{code}", changes)
        folders[family] = folder
    return folders


@pytest.mark.parametrize("reader", READERS["sentencepiece"])
def test_ids_of_an_extended_tokenizer_are_those_of_transformers(
    reference: References, extended: dict[str, Path], reader: str
) -> None:
    version, name, options = READERS["sentencepiece"][reader]
    tokenizer = SentencePieceTokenizer.load(extended["xl"])
    assert tokenizer.vocab_size == 200 + 2 * PIECES
    found = [d["text"] for code in DOCUMENTS for d in documents(code, 40)]
    texts = [*MIXED, *SENTENCES.values(), *found, *random_texts(500)]
    texts = [text for text in texts if comparable(text, "sentencepiece", reader, split=False)]
    assert len(texts) > 400
    ids = [tokenizer.encode(text) for text in texts]
    assert sum(i in range(199, 199 + 2 * PIECES) for cut in ids for i in cut) > 1000, "new pieces are in use"
    call = {"add_special_tokens": False, "split_special_tokens": True}
    theirs = reference(version).encode(extended["xl"], texts, name, options, **call)
    for text, ours, expected in zip(texts, ids, theirs, strict=True):
        assert ours == expected, ascii(text)
    prompt = reference(version).encode(extended["xl"], ["Alle <mask>"], name, options, add_special_tokens=False)[0]
    assert prompt[-1] == tokenizer.mask_id == 199 + 2 * PIECES


@both_versions
@pytest.mark.parametrize("family", CLASSES)
def test_an_extended_folder_loads_with_nothing_to_report_and_the_same_logits(
    reference: References, extended: dict[str, Path], version: str, family: str
) -> None:
    model = load_pretrained(extended[family])
    assert model.config.vocab_size == 200 + 2 * PIECES  # 248 rows were too few
    tokenizer = SentencePieceTokenizer.load(extended[family])
    ids = torch.tensor([[0, *tokenizer.encode(SENTENCES["hi_IN"])[:40], tokenizer.mask_id, 2]])
    found = reference(version).load(extended[family], CLASSES[family], {"input_ids": ids})
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, found.tensors["logits"], atol=1e-5, rtol=0)
