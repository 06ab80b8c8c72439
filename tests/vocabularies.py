"""A small tokenizer that lacks some languages, and text of these: what several modules' tests extend."""

from pathlib import Path

from tests.corpora import documents
from xlscale.tokenizer import SentencePieceTokenizer, train_sentencepiece

OLD = {"en_XX": 60, "ru_RU": 40, "zh_CN": 40}
IDS = 200
PIECES = 40
"""As many as 60 documents of German yield."""


def texts(language: str, count: int) -> list[str]:
    """Texts of a language's documents."""
    return [document["text"] for document in documents(language, count)]


def old_tokenizer(folder: Path) -> SentencePieceTokenizer:
    """Of the three old languages, without German words and Hindi letters."""
    lines = (text for language, count in OLD.items() for text in texts(language, count))
    return train_sentencepiece(lines, IDS, folder, character_coverage=1.0)
