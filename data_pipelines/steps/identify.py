"""Identify: a page's language by two identifiers, py3langid and pycld2, their models inside the wheels; or by a
fastText model of the user's.

Romanised languages (hi_Latn) are known to models only, or by read.language_from; Burmese in Zawgyi is told here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pycld2
from datatrove.data import Document
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from data_pipelines.config import IdentifyConfig
from data_pipelines.config_rules import NUMBERS
from data_pipelines.steps.burmese import burmese
from data_pipelines.steps.clean import normalise
from data_pipelines.steps.document import DocumentStep, drop
from data_pipelines.steps.letters import language_of_letters
from data_pipelines.steps.model import load
from data_pipelines.steps.thresholds import numbers
from xlscale.languages import from_iso

# Characters taken at the start, the middle and the end: time grows with the text. With 700 py3langid is as often right,
# and more often sure of languages that it does not know.
SAMPLE = 250
MODEL_SAMPLE = 700  # the same for a fastText model, which is faster
MIXED = 10  # percent of a page in a second language from which its paragraphs are looked at one by one

# (least probability, least share) of a language, None: of one that we do not have.
Limits = Callable[[str | None], tuple[float, float]]


class Vote(NamedTuple):
    """What an identifier says: a code of its own, and from 0 to 1 how sure it is."""

    code: str
    share: float


class IdentifyLanguage(DocumentStep):
    """Sets metadata["language"] (a code of xlscale.languages), or drops the document; one that is set stays.

    metadata["certainty"], for the report: the model's probability; of the two identifiers the share of the page that is
    this language to pycld2, or py3langid's probability where that does not know.
    """

    name = "identify"

    def __init__(self, config: IdentifyConfig):
        super().__init__()
        self.config, self.languages = config, frozenset(config.languages)
        self.thresholds = numbers(config.thresholds, NUMBERS["identify.thresholds"]) if config.thresholds else {}

    def process(self, document: Document) -> None:
        if "language" not in document.metadata:  # else the archive said it: read.language_from
            self.identify(document)
        language = document.metadata.get("language")
        if language and self.languages and language not in self.languages:
            drop(document, "language_unwanted")

    def identify(self, document: Document) -> None:
        """Set the language of the text, without its paragraphs in others, or drop the document."""
        decided = self.by_model if self.config.model else self.by_votes
        language, reason = decided(document)
        if language == "my_MM":
            language, reason = burmese(document.text), "language_unsupported"
        if language:
            document.metadata["language"] = language
        else:
            drop(document, reason)

    def by_votes(self, document: Document) -> tuple[str | None, str]:
        """(our code, "") or (None, why not) by py3langid and pycld2."""
        document.text, document.metadata["foreign_characters"] = without_foreign_paragraphs(
            document.text, self.config.min_paragraph
        )
        if language := language_of_letters(document.text):
            document.metadata["certainty"] = 1.0
            return language, ""
        second = second_vote(document.text)
        # Where the second is sure the first, which takes three times as long, would change nothing.
        alone = second.share >= self.limits(from_iso(second.code))[1]
        first = Vote("", 0.0) if alone else first_vote(document.text)
        document.metadata["certainty"] = round(second.share or first.share, 3)
        return decide(first, second, self.limits)

    def by_model(self, document: Document) -> tuple[str | None, str]:
        """The same by the model."""
        model = load(self.config.model)
        main = model.guess(sample(document.text, MODEL_SAMPLE))

        def foreign(line: str) -> bool:
            found = model.guess(line)
            sure = found.probability >= self.limits(found.code)[0]
            return sure and (found.code or found.label) != (main.code or main.label)

        document.text, document.metadata["foreign_characters"] = without(
            document.text, self.config.min_paragraph, foreign
        )
        document.metadata["certainty"] = round(main.probability, 3)
        if main.probability < self.limits(main.code)[0]:
            return None, "language_uncertain"
        if main.code == "zh_CN" and "Hans" not in main.label:  # of both scripts: GlotLID's cmn_Hani, lid.176's zh
            return "zh_TW" if second_vote(document.text).code == "zh-Hant" else "zh_CN", ""
        return (main.code, "") if main.code else (None, "language_unsupported")

    def limits(self, language: str | None) -> tuple[float, float]:
        """(min_probability, share from min_percent) of a language, or of those that we do not know."""
        given = self.thresholds.get(language or "", {})
        percent = given.get("min_percent", self.config.min_percent)
        return given.get("min_probability", self.config.min_probability), percent / 100


def decide(first: Vote, second: Vote, limits: Limits) -> tuple[str | None, str]:
    """(our code, "") or (None, why not) from the votes of py3langid and pycld2.

    Where both agree, 97.3 % are right (measured on noisy paragraphs). Where they do not, pycld2 is believed
    if nearly all of the page is one language to it, and py3langid if pycld2 does not know and it is sure.
    """
    # Script and variant come from the second vote: the first knows one Chinese, one Serbian.
    same_language = first.code.split("-")[0] == second.code.split("-")[0]
    ours, theirs = from_iso(first.code), from_iso(second.code)
    if same_language or (ours and ours == theirs) or second.share >= limits(theirs)[1]:
        code, known = second.code, theirs
    elif second.share == 0 and first.share >= limits(ours)[0]:
        code, known = first.code, ours
    else:
        return None, "language_uncertain"
    return (known, "") if known and code != "un" else (None, "language_unsupported")


@functools.cache
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sample(text: str, size: int) -> str:
    """Three pieces of so many characters of a longer text."""
    if len(text) <= 3 * size:
        return text
    middle = len(text) // 2
    return "\n".join((text[:size], text[middle : middle + size], text[-size:]))


def first_vote(text: str) -> Vote:
    """py3langid's language of three pieces of the text."""
    code, probability = _identifier().classify(sample(text, SAMPLE))
    return Vote(code, probability)


def second_vote(text: str) -> Vote:
    """pycld2's language of the whole text; a share of 0 where it calls itself unreliable."""
    reliable, _, found = _detect(text)
    return Vote(found[0][1], found[0][2] / 100 if reliable else 0.0)


def without_foreign_paragraphs(text: str, min_paragraph: int) -> tuple[str, int]:
    """(text, characters taken out): a page in several languages, to pycld2, keeps the paragraphs of the main one."""
    reliable, _, found = _detect(text)
    if not reliable or found[1][2] < MIXED:
        return text, 0
    main = found[0][1].split("-")[0]

    def foreign(line: str) -> bool:
        sure, _, languages = _detect(line)
        return sure and languages[0][1].split("-")[0] not in (main, "un")

    return without(text, min_paragraph, foreign)


def without(text: str, min_paragraph: int, foreign: Callable[[str], bool]) -> tuple[str, int]:
    """(text, characters taken out): the lines that are foreign, of those that are long enough to tell."""
    lines = text.split("\n")
    out = {line for line in lines if len(line) >= min_paragraph and foreign(line)}
    if not out:
        return text, 0
    return normalise("\n".join(line for line in lines if line not in out)), sum(len(x) for x in lines if x in out)


@functools.lru_cache(maxsize=1)  # a page is asked for twice
def _detect(text: str) -> tuple[bool, int, tuple[tuple[str, str, int, float], ...]]:
    try:
        return pycld2.detect(text.encode("utf-8"), isPlainText=True)
    except pycld2.error:  # a character that it does not take for valid UTF-8
        return False, 0, (("Unknown", "un", 0, 0.0),) * 3
