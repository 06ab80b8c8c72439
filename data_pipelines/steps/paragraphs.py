"""Paragraphs that other pages of the language had before: menus, notices of licences, quoted news.

As CCNet (Wenzek et al. 2020, section 3.1): a paragraph is a line without case, accents and punctuation, digits all
alike, by 64 bits of a hash; the first one, by the order of the pages' ids, stays.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline

from data_pipelines.steps.columns import column, mapped
from data_pipelines.steps.document import drop
from data_pipelines.steps.filter import weight
from data_pipelines.steps.join import mark_repeats
from data_pipelines.steps.spool import SpooledStep

PARAGRAPH = np.dtype([("key", "<u8"), ("letters", "<u4")])

_DIGIT = re.compile(r"\d")
_NO_LETTER = re.compile(r"[^\w\s]|_")  # punctuation, and marks: \w lacks them
_BLANKS = re.compile(r"\n{3,}")


def paragraph_key(line: str) -> bytes:
    """8 bytes that all spellings of a paragraph have in common; none where it has neither letter nor digit."""
    letters = _NO_LETTER.sub("", _DIGIT.sub("0", unicodedata.normalize("NFD", line.lower())))
    plain = " ".join(letters.split())
    return hashlib.blake2b(plain.encode("utf-8"), digest_size=8).digest() if plain else b""


def paragraphs(text: str) -> bytes:
    """A row of PARAGRAPH for each line of a text that has a key."""
    rows = ((paragraph_key(line), weight(line)) for line in text.split("\n"))
    return b"".join(key + letters.to_bytes(4, "little") for key, letters in rows if key)


def too_little(marks: np.ndarray, letters: np.ndarray, ends: np.ndarray, least: int) -> np.ndarray:
    """Whether documents lose paragraphs and have fewer than `least` letters in those that they keep, (N,) bool.

    Of each paragraph 1 if it is taken out and its letters; of each document where its paragraphs end.
    """
    left = np.concatenate(([0], np.cumsum(np.where(marks, 0, letters), dtype=np.int64)))
    lost = np.concatenate(([0], np.cumsum(marks, dtype=np.int64)))
    begins = np.concatenate(([0], ends[:-1])).astype(np.int64)[: len(ends)]
    ends = ends.astype(np.int64)
    result: np.ndarray = (lost[ends] > lost[begins]) & (left[ends] - left[begins] < least)
    return result


class DropRepeatedParagraphs(SpooledStep):
    """Takes out paragraphs that a page before had; drops the page if fewer than `min_characters` letters are left.

    Sets metadata["repeated_characters"]. Two different paragraphs of a billion are taken for one with probability
    .03.
    """

    name = "paragraphs"
    columns = ("paragraphs", "paragraph_ends")

    def __init__(self, min_characters: int, folder: Path | None = None, memory_mib: int = 256):
        super().__init__(folder, memory_mib)
        self.min_characters = min_characters

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        self.end = 0
        yield from super().run(data, rank, world_size)

    def facts(self, document: Document) -> Sequence[bytes]:
        rows = paragraphs(document.text)
        self.end += len(rows) // PARAGRAPH.itemsize
        return rows, self.end.to_bytes(8, "little")

    def decide(self, folder: Path, total: int) -> None:
        rows, ends = mapped(folder / "paragraphs", PARAGRAPH), mapped(folder / "paragraph_ends", "<u8")
        self.marks = column(folder / "marks", np.uint8, (len(rows),))
        mark_repeats(rows["key"], self.memory, self.marks)
        self.gone = too_little(self.marks, rows["letters"], ends, self.min_characters)
        self.ends = ends

    def mark(self, document: Document, place: int) -> None:
        begin = int(self.ends[place - 1]) if place else 0
        take_out(document, self.marks[begin : int(self.ends[place])])
        if self.gone[place]:
            drop(document, "repeated_paragraphs")


def take_out(document: Document, marks: np.ndarray) -> None:
    """Remove the lines whose mark is 1, one for each line with a key."""
    if not marks.any():
        return
    rest = iter(marks.tolist())
    # By `and`, a line without a key takes no mark.
    kept = [line for line in document.text.split("\n") if not (paragraph_key(line) and next(rest))]
    text = _BLANKS.sub("\n\n", "\n".join(kept)).strip()
    document.metadata["repeated_characters"] = len(document.text) - len(text)
    document.text = text
