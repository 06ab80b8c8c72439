"""Filter: what is not text to learn from, by rules that hold in any script."""

import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable

from datatrove.data import Document

from data_pipelines.config import FilterConfig
from data_pipelines.steps.document import DocumentStep, drop

# Han, Kana, Hangul: a character is a syllable or a word.
_DENSE = re.compile(r"[\u1100-\u11ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]")
DENSE_WEIGHT = 3  # letters that such a character counts for
_NO_LETTER = re.compile(r"[^\w\s]|_")  # and marks: \w lacks them
_CODE = re.compile(r"[{}]|</|/>|\\[nt]|;$|^\s*[#$>] |=>|==|&&|\|\||::|^[\w./-]+/[\w./-]+$")
SENTENCE = 40  # weighted letters from which a line is taken for a sentence


def weight(text: str) -> int:
    """Length of a text in letters, comparable between scripts."""
    return len(text) if text.isascii() else len(text) + (DENSE_WEIGHT - 1) * len(_DENSE.findall(text))


def is_shorter(text: str, letters: int) -> bool:
    """weight(text) < letters, which need not be counted where the characters are enough."""
    return len(text) < letters and weight(text) < letters


@functools.lru_cache(maxsize=1)
def letters(text: str) -> float:
    """Share of letters, marks and digits in what is not space."""
    found = Counter(_NO_LETTER.findall(text))
    signs = sum(count for sign, count in found.items() if not unicodedata.category(sign).startswith("M"))
    return 1 - signs / max(1, len("".join(text.split())))


def duplicate_lines(text: str) -> float:
    """Share of the text in lines that were there before."""
    lines = _lines(text)
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    return repeated / max(1, sum(map(len, lines)))


def short_lines(text: str) -> float:
    """Share of the lines that are too short for a sentence."""
    lines = _lines(text)
    return sum(is_shorter(line, SENTENCE) for line in lines) / max(1, len(lines))


def code_lines(text: str) -> float:
    """Share of the text in lines with signs of program code or markup."""
    lines = _lines(text)
    return sum(len(line) for line in lines if _CODE.search(line)) / max(1, sum(map(len, lines)))


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


# reason -> whether a text is to be dropped for it; the first that holds counts.
RULES: dict[str, Callable[[str, FilterConfig], bool]] = {
    "too_short": lambda text, cfg: is_shorter(text, cfg.min_characters),
    "too_long": lambda text, cfg: len(text) > cfg.max_characters,
    "too_few_letters": lambda text, cfg: letters(text) < cfg.min_letters,
    "duplicate_lines": lambda text, cfg: duplicate_lines(text) > cfg.max_duplicate_lines,
    "short_lines": lambda text, cfg: short_lines(text) > cfg.max_short_lines,
    "code": lambda text, cfg: code_lines(text) > cfg.max_code_lines,
}


class FilterQuality(DocumentStep):
    """Drops a document for the first of RULES that it breaks; sets metadata["letters"], for the report."""

    name = "filter"

    def __init__(self, config: FilterConfig):
        super().__init__()
        self.config = config

    def process(self, document: Document) -> None:
        document.metadata["letters"] = round(letters(document.text), 3)
        for reason, broken in RULES.items():
            if broken(document.text, self.config):
                drop(document, reason)
                return
