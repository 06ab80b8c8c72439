"""Perplexity: how much a text is like that of a language's KenLM model, in CCNet's three buckets.

Wenzek et al. 2020 (arXiv 1911.00359), section 3.4: models of Wikipedia over SentencePiece's pieces; a third of a
language's pages is its head, a third its tail. Text goes to the pieces as theirs did: in small letters, without
accents, each digit a 0. After deduplication the step has fewer pages to look at, and a task one language.
"""

import functools
import re
import unicodedata
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document

from data_pipelines.config import PerplexityConfig, RecipeError
from data_pipelines.config_rules import NUMBERS
from data_pipelines.steps.document import DocumentStep, drop
from data_pipelines.steps.thresholds import numbers
from xlscale.languages import LANGUAGES

_DIGIT = re.compile(r"\d")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_PLAIN_SIGNS = str.maketrans({
    "\uff0c": ",", "\u3002": ".", "\u3001": ",", "\u201e": '"', "\u201d": '"', "\u201c": '"', "\u00ab": '"',
    "\u00bb": '"', "\u300d": '"', "\u300c": '"', "\u300a": '"', "\u300b": '"', "\u00b4": "'",
    "\u2236": ":", "\uff1a": ":", "\uff1f": "?", "\uff01": "!", "\uff08": "(", "\uff09": ")", "\uff1b": ";",
    "\u2013": "-", "\u2014": " - ", "\uff0e": ". ", "\uff5e": "~", "\u2019": "'", "\u2026": "...", "\u2501": "-",
    "\u3008": "<", "\u3009": ">", "\u3010": "[", "\u3011": "]", "\uff05": "%", "\u25ba": "-",
})  # fmt: skip


def normalised(line: str) -> str:
    """A line as the models have seen theirs."""
    plain = unicodedata.normalize("NFD", line.strip().lower())
    plain = "".join(sign for sign in plain if unicodedata.category(sign) != "Mn")
    return _CONTROL.sub("", _DIGIT.sub("0", plain).translate(_PLAIN_SIGNS))


class LanguageModel(NamedTuple):
    """A KenLM model, the SentencePiece model of its pieces, and the perplexities that bound the buckets."""

    model: Any
    pieces: Any
    head: float
    tail: float

    def perplexity(self, text: str) -> float:
        """Of the text's lines, one by one, per piece."""
        score, length = 0.0, 0
        for line in text.split("\n"):
            if not line.strip():
                continue
            pieces = self.pieces.encode(normalised(line), out_type=str)
            score += self.model.score(" ".join(pieces))  # log10
            length += len(pieces) + 1  # and the end of the line
        return min(10.0 ** (-score / max(1, length)), 1e9)

    def bucket(self, perplexity: float) -> str:
        """Head, middle or tail."""
        return "head" if perplexity < self.head else "middle" if perplexity < self.tail else "tail"


class SortByPerplexity(DocumentStep):
    """Sets metadata["perplexity"] and ["bucket"] in languages that have a model, and drops the buckets not kept."""

    name = "perplexity"

    def __init__(self, config: PerplexityConfig):
        super().__init__()
        self.keep = frozenset(config.keep)
        self.files: dict[str, tuple[Path, Path, float, float]] = {}
        problems = []
        cutoffs = numbers(config.cutoffs, NUMBERS["perplexity.cutoffs"])
        for language in LANGUAGES:
            model, pieces = (_of_language(path, language) for path in (config.models, config.tokenizers))
            bounds = cutoffs.get(language, {})
            head, tail = bounds.get("head", 1.0), bounds.get("tail", 0.0)
            if model and pieces and head <= tail:
                self.files[language] = (model, pieces, head, tail)
            elif model:
                problems.append(f"{model}: {language} needs a file of {config.tokenizers}, and in {config.cutoffs} a "
                                f"head that is not above its tail; add them, or move the model away")  # fmt: skip
        if not self.files and not problems:
            problems.append(f"perplexity.models = {config.models!r}: no language has a file there (from {Path.cwd()}); "
                            f"name them by language, with {{language}} in the path")  # fmt: skip
        if problems:
            raise RecipeError(problems)

    def process(self, document: Document) -> None:
        files = self.files.get(document.metadata["language"])
        if not files:
            return
        model = _loaded(*files)
        perplexity = model.perplexity(document.text)
        bucket = model.bucket(perplexity)
        document.metadata |= {"perplexity": round(perplexity, 1), "bucket": bucket}
        if bucket not in self.keep:
            drop(document, f"perplexity_{bucket}")


@functools.cache
def _loaded(model: Path, pieces: Path, head: float, tail: float) -> LanguageModel:
    import kenlm  # an extra: config_load.py says so before anything runs
    import sentencepiece

    settings = kenlm.Config()
    settings.load_method = kenlm.LoadMethod.LAZY  # mapped: all tasks of a machine share one copy
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    return LanguageModel(kenlm.Model(str(model), settings), processor, head, tail)


def _of_language(pattern: str, language: str) -> Path | None:
    """The file of a language, named by our code or, as CCNet's, by that of ISO 639."""
    paths = [Path(pattern.replace("{language}", name)) for name in (language, language.partition("_")[0])]
    return next((path for path in paths if path.is_file()), None)
