"""What a vocabulary is extended by: texts of the new language, some of them held out, and of old ones to compare."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from xlscale.data.shards import Corpus
from xlscale.tokenizer import sampled_texts

CHARACTERS = 20_000_000
"""Read of the new language: pieces are learnt on them in some 400 MB of memory, 1.2 GB where a letter is 3 bytes."""
OLD_CHARACTERS = 500_000
"""Read of each old language, by default, to see what becomes of its cut."""
HELD_OUT = 64  # documents of the new language for the loss, at most
_LEAST = 8  # documents that the new language must have
_EVERY = 20  # of so many documents one is held out


@dataclass(frozen=True)
class Texts:
    """Documents as they are read, in an order that depends on corpus and seed alone."""

    language: str
    """"" where a text file's is not told."""
    training: list[str]
    held_out: list[str]
    old: dict[str, list[str]]
    """Language -> documents."""


def read_texts(
    corpus: str | Path,
    language: str = "",
    old_shards: str | Path | None = None,
    only: Sequence[str] = (),
    characters: int = CHARACTERS,
    old_characters: int = OLD_CHARACTERS,
    seed: int = 0,
) -> Texts:
    """The texts of a folder of shards or of a text file with a document a line; a part of them, if they are many.

    language: may be left out where the corpus has one. old_shards: a folder with old languages' shards; by default
    those beside the new one. only: the languages that count as old, if any are named.
    ValueError for a corpus without the language, and for one too small to hold anything out.
    """
    corpus = Path(corpus)
    beside: list[str] = []
    if corpus.is_file():
        documents = list(_lines(corpus, characters))
    else:
        languages = Corpus.open(corpus).languages
        if not language and len(languages) > 1:
            raise ValueError(f"{corpus} has {', '.join(languages)}; say which one gets the pieces with --language")
        language = language or languages[0]
        documents = _documents(corpus, language, characters, seed)
        beside = languages
    if len(documents) < _LEAST:
        raise ValueError(
            f"{corpus} has {len(documents)} documents with text; at least {_LEAST} are needed, a line each"
        )
    every = max(2, min(_EVERY, len(documents) // 4))
    apart = set(range(0, len(documents), every)[:HELD_OUT])
    old_folder = corpus if old_shards is None else Path(old_shards)
    old = beside if old_shards is None else Corpus.open(old_folder).languages
    return Texts(
        language,
        [text for i, text in enumerate(documents) if i not in apart],
        [documents[i] for i in sorted(apart)],
        {
            code: _documents(old_folder, code, old_characters, seed)
            for code in old
            if code != language and (not only or code in only)
        },
    )


def _documents(folder: Path, language: str, characters: int, seed: int) -> list[str]:
    """Documents of a language in random order, up to so many characters, none of them twice."""
    corpus = Corpus.open(folder, [language])
    available = sum(record.characters for record in corpus.records(language))
    return [text for text in sampled_texts(corpus, 1.0, min(characters, available), seed) if text.strip()]


def _lines(path: Path, characters: int) -> Iterator[str]:
    """Lines of a text file that are not blank."""
    with path.open(encoding="utf-8") as file:
        try:
            for line in file:
                if line.strip():
                    characters -= len(line)
                    yield line.strip()
                if characters <= 0:
                    return
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not text in UTF-8 ({error}); convert it, or give a folder of shards") from None
