"""Quality: the rules of Gopher, C4, mC4 and FineWeb, for any script, with thresholds of each language.

A recipe names the sets that are to hold (filter.rules). A rule is a line of RULES: the reason it drops a page for, and
a comparison of a measure of the page with a threshold; where the papers stand is in thresholds.py.
"""

import re
from collections.abc import Callable
from functools import cached_property

import numpy as np
from datatrove.data import Document

from data_pipelines.steps.document import DocumentStep, drop
from data_pipelines.steps.filter import weight
from data_pipelines.steps.lines import CLOSING, ENDS, LINE_END, kept_lines
from data_pipelines.steps.thresholds import Thresholds, thresholds
from data_pipelines.steps.words import is_unspaced, pieces, words

_SENTENCE_END = re.compile(f"[{ENDS}]+[{CLOSING}]*(?=\\s|$|[^\\x00-\\u02ff])")
_ELLIPSIS = re.compile(r"\.\.\.|…")
_BULLETS = ("-", "*", "•", "‣", "▪", "●", "○", "◦", "■", "□", "\u2013", "·")
_LOREM = re.compile(r"lorem ipsum", re.IGNORECASE)
LONG, SHORT = 200, 30  # letters in a long line of mC4, in a short one of FineWeb
EMPTY = np.zeros(0, dtype=np.uint64)


class Measures:
    """What the rules ask of a text, each measured once and only if a rule asks."""

    def __init__(self, text: str):
        self.text = text
        self.lines = [line for line in text.split("\n") if line]
        self.paragraphs = [part for part in re.split(r"\n{2,}", text) if part]

    @cached_property
    def words(self) -> list[str]:
        """Words without signs."""
        return words(self.text)

    @property
    def mean_word(self) -> float:
        """Characters in a word."""
        return sum(map(len, self.words)) / max(1, len(self.words))

    @property
    def alphabetic(self) -> float:
        """Share of the words with a letter in them: the others are numbers."""
        return sum(any(map(str.isalpha, word)) for word in self.words) / max(1, len(self.words))

    def per_word(self, count: int) -> float:
        """So many per word."""
        return count / max(1, len(self.words))

    def of_lines(self, test: Callable[[str], object]) -> float:
        """Share of the lines for which it holds."""
        return sum(bool(test(line)) for line in self.lines) / max(1, len(self.lines))

    @property
    def sentences(self) -> int:
        """Signs that end a sentence; a line that ends without one is none."""
        return len(_SENTENCE_END.findall(self.text))

    def stop_words(self, wanted: tuple[str, ...]) -> int:
        """How many of these words are there: as words, or where a script has no spaces, as a part of the text."""
        spaced = {word.lower() for word in self.words}
        folded = self.text.lower()
        return sum(word in spaced or (is_unspaced(word) and word in folded) for word in wanted)

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray, float]:
        """(a number for each piece, its characters, pieces in a word)."""
        found = pieces(self.text)
        numbers: dict[str, int] = {}
        ids = np.array([numbers.setdefault(piece, len(numbers)) for piece in found], dtype=np.uint64)
        lengths = np.array([len(piece) for piece in found], dtype=np.int64)
        return ids, lengths, len(found) / max(1, len(self.words))

    def _grams(self, size: int) -> tuple[np.ndarray, int]:
        """(hashes of all runs of `size` words, pieces in one): as many more pieces where words are several."""
        ids, _, in_word = self._pieces
        size = max(1, round(size * in_word))
        runs = len(ids) - size + 1
        if runs < 1:
            return EMPTY, size
        mixed = (ids + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        hashes = np.zeros(runs, dtype=np.uint64)
        for place in range(size):
            hashes = hashes * np.uint64(0x100000001B3) + mixed[place : place + runs]
        return hashes, size

    def top_gram(self, size: int) -> float:
        """Share of the characters in the most frequent run of `size` words, if it is there more than once."""
        hashes, size = self._grams(size)
        if not len(hashes):
            return 0.0
        lengths = self._pieces[1]
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        most = counts == counts.max()
        if counts.max() == 1:
            return 0.0
        ends = np.concatenate(([0], np.cumsum(lengths)))
        characters = int((ends[first[most] + size] - ends[first[most]]).max())
        return min(1.0, characters * int(counts.max()) / int(ends[-1]))

    def repeated_grams(self, size: int) -> float:
        """Share of the characters in runs of `size` words that were there before, each counted once."""
        hashes, size = self._grams(size)
        if not len(hashes):
            return 0.0
        lengths = self._pieces[1]
        again = np.ones(len(hashes), dtype=bool)
        again[np.unique(hashes, return_index=True)[1]] = False
        edges = np.zeros(len(lengths) + 1, dtype=np.int64)
        edges[:-size] += again
        edges[size:] -= again
        return float(lengths[np.cumsum(edges)[:-1] > 0].sum() / lengths.sum())


def repeated(parts: list[str]) -> float:
    """Share of the parts that were there before."""
    return 1 - len(set(parts)) / max(1, len(parts))


def repeated_characters(parts: list[str]) -> float:
    """Share of the characters in parts that were there before."""
    return 1 - sum(map(len, set(parts))) / max(1, sum(map(len, parts)))


# set -> reason -> whether a text is to be dropped for it; the first that holds counts.
RULES: dict[str, dict[str, Callable[[Measures, Thresholds], bool]]] = {
    "gopher": {
        "gopher_few_words": lambda m, t: len(m.words) < t.min_words,
        "gopher_many_words": lambda m, t: len(m.words) > t.max_words,
        "gopher_short_words": lambda m, t: m.mean_word < t.min_mean_word,
        "gopher_long_words": lambda m, t: m.mean_word > t.max_mean_word,
        "gopher_hashes": lambda m, t: m.per_word(m.text.count("#")) > t.max_hashes,
        "gopher_ellipses": lambda m, t: m.per_word(len(_ELLIPSIS.findall(m.text))) > t.max_ellipses,
        "gopher_bullets": lambda m, t: m.of_lines(lambda line: line.startswith(_BULLETS)) > t.max_bullet_lines,
        "gopher_ellipsis_lines": lambda m, t: (
            m.of_lines(lambda line: line.endswith(("...", "…"))) > t.max_ellipsis_lines
        ),
        "gopher_not_alphabetic": lambda m, t: m.alphabetic < t.min_alphabetic,
        "gopher_stop_words": lambda m, t: (
            len(t.stop_words) >= t.min_stop_words > 0 and m.stop_words(t.stop_words) < t.min_stop_words
        ),
    },
    "gopher_repetition": {
        "gopher_repeated_lines": lambda m, t: (
            repeated(m.lines) > t.max_repeated_lines
            or repeated_characters(m.lines) > t.max_repeated_line_characters
        ),
        "gopher_repeated_paragraphs": lambda m, t: (
            repeated(m.paragraphs) > t.max_repeated_paragraphs
            or repeated_characters(m.paragraphs) > t.max_repeated_paragraph_characters
        ),
        "gopher_top_gram": lambda m, t: any(
            m.top_gram(size) > getattr(t, f"max_top_{size}_gram") for size in range(2, 5)
        ),
        "gopher_repeated_grams": lambda m, t: any(
            m.repeated_grams(size) > getattr(t, f"max_repeated_{size}_grams") for size in range(5, 11)
        ),
    },
    # The lines that break C4's rules are taken out before.
    "c4_lines": {
        "c4_no_lines": lambda m, t: not m.lines,
    },
    "c4": {
        "c4_lorem_ipsum": lambda m, t: bool(_LOREM.search(m.text)),
        "c4_curly_bracket": lambda m, t: "{" in m.text,
        "c4_few_sentences": lambda m, t: m.sentences < t.min_sentences,
    },
    "mc4": {
        "mc4_few_long_lines": lambda m, t: sum(weight(line) >= LONG for line in m.lines) < t.min_long_lines,
    },
    "fineweb": {
        "fineweb_ended_lines": lambda m, t: m.of_lines(LINE_END.search) < t.min_ended_lines,
        "fineweb_short_lines": lambda m, t: m.of_lines(lambda line: weight(line) <= SHORT) > t.max_short_lines,
        "fineweb_duplicate_lines": lambda m, t: repeated_characters(m.lines) > t.max_duplicate_characters,
        "fineweb_line_breaks": lambda m, t: m.per_word(len(m.lines) - 1) > t.max_line_breaks,
    },
}  # fmt: skip


class CheckQuality(DocumentStep):
    """Drops a document for the first rule of the recipe's sets that it breaks, by its language's thresholds.

    With c4_lines it takes lines out before, and sets metadata["removed_lines"]: how many.
    """

    name = "quality"

    def __init__(self, sets: list[str], path: str = ""):
        super().__init__()
        self.rules = {reason: broken for name in sets for reason, broken in RULES[name].items()}
        self.thresholds = thresholds(path)

    def process(self, document: Document) -> None:
        if not self.rules:
            return
        limits = self.thresholds[document.metadata["language"]]
        if "c4_no_lines" in self.rules:
            document.text, document.metadata["removed_lines"] = kept_lines(document.text, limits)
        measures = Measures(document.text)
        for reason, broken in self.rules.items():
            if broken(measures, limits):
                drop(document, reason)
                return
