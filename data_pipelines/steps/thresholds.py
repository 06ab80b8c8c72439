"""Thresholds of the quality rules, per language: defaults from the papers, a recipe's TOML file, FineWeb-2's files.

Of Gopher: Rae et al. 2021 (arXiv 2112.11446), appendix A.1; C4: Raffel et al. 2020 (arXiv 1910.10683), section 2.2;
mC4: Xue et al. 2021 (arXiv 2010.11934); FineWeb: Penedo et al. 2024 (arXiv 2406.17557); FineWeb-2: Penedo et al. 2025
(arXiv 2506.20920), whose files (configs/deu_Latn.yml, ...) its repository publishes under Apache-2.0.
"""

import difflib
import functools
import json
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from xlscale.languages import LANGUAGES, from_iso


@dataclass(frozen=True, kw_only=True)
class Thresholds:
    """What a text may have and must have, in one language; 0 lets everything pass a min_, 1 a share's max_."""

    min_words: int = 50
    """Gopher: fewest words of a page."""
    max_words: int = 100_000
    """Gopher: most words of a page."""
    min_mean_word: float = 3.0
    """Gopher: shortest mean length of its words, in characters."""
    max_mean_word: float = 10.0
    """Gopher: longest mean length of its words."""
    max_hashes: float = 0.1
    """Gopher: hash signs per word."""
    max_ellipses: float = 0.1
    """Gopher: ellipses per word."""
    max_bullet_lines: float = 0.9
    """Gopher: share of lines that start with a bullet."""
    max_ellipsis_lines: float = 0.3
    """Gopher: share of lines that end with an ellipsis."""
    min_alphabetic: float = 0.8
    """Gopher: share of the words with a letter in them."""
    min_stop_words: int = 2
    """Gopher: how many different of the stop words a page has at least, where there are any."""
    stop_words: tuple[str, ...] = ()
    """Frequent short words of the language, in small letters; without them the rule does not hold."""
    max_repeated_lines: float = 0.3
    """Gopher: share of lines that were there before."""
    max_repeated_paragraphs: float = 0.3
    """Gopher: share of paragraphs (between empty lines) that were there before."""
    max_repeated_line_characters: float = 0.2
    """Gopher: share of the characters that stand in such lines."""
    max_repeated_paragraph_characters: float = 0.2
    """Gopher: share of the characters that stand in such paragraphs."""
    max_top_2_gram: float = 0.2
    """Gopher: share of the characters in the most frequent two words; likewise of three and four."""
    max_top_3_gram: float = 0.18
    max_top_4_gram: float = 0.16
    max_repeated_5_grams: float = 0.15
    """Gopher: share of the characters in runs of five words that were there before; likewise of six to ten."""
    max_repeated_6_grams: float = 0.14
    max_repeated_7_grams: float = 0.13
    max_repeated_8_grams: float = 0.12
    max_repeated_9_grams: float = 0.11
    max_repeated_10_grams: float = 0.1
    min_sentences: int = 5
    """C4: fewest signs that end a sentence."""
    need_line_end: int = 1
    """C4's lines: whether only lines stay that end as a sentence does."""
    min_line_words: int = 5
    """C4's lines: fewest words of a line that stays."""
    min_long_lines: int = 3
    """mC4: fewest lines of at least 200 letters (a character of Han, Kana or Hangul counts for three)."""
    min_ended_lines: float = 0.12
    """FineWeb: share of lines that end with a sign that ends a sentence."""
    max_short_lines: float = 0.67
    """FineWeb: share of lines of up to 30 letters (counted as above)."""
    max_duplicate_characters: float = 0.01
    """FineWeb: share of the characters in lines that were there before."""
    max_line_breaks: float = 0.3
    """FineWeb: line breaks per word."""


FIELDS = {spec.name: spec for spec in fields(Thresholds)}
# Where the papers' numbers, which are for English, cannot hold, whatever the page.
# A word is two characters (words.py), and particles and formulas repeat more (FineWeb-2 allows them .31 to .22).
_PIECES = {
    "min_mean_word": 1.0,
    **{
        f"max_repeated_{size}_grams": share
        for size, share in zip(range(5, 11), (0.3, 0.28, 0.26, 0.24, 0.22, 0.2), strict=True)
    },
}
_NO_FULL_STOP = {"min_sentences": 0, "min_ended_lines": 0.0, "need_line_end": 0}  # a space stands where a sentence ends
_SHORT = {"min_mean_word": 2.0}
_LONG = {"max_mean_word": 15.0}
_BUILT_IN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("ja_XX", "zh_CN", "zh_TW", "km_KH", "my_MM", "my_Qaag"), _PIECES),
    "ko_KR": {"min_mean_word": 1.5},  # a character is a syllable
    **dict.fromkeys(("th_TH", "lo_LA"), _PIECES | _NO_FULL_STOP),
    **dict.fromkeys(("vi_VN", "ps_AF", "ur_PK"), _SHORT),
    # Words of many parts, and in Indic scripts marks that count as characters.
    **dict.fromkeys(("kn_IN", "ml_IN", "sa_IN", "ta_IN", "te_IN", "xh_ZA", "fi_FI", "de_DE", "hu_HU"), _LONG),
}

# FineWeb-2's names; pairs of a length and a share are top_n_grams and dup_n_grams.
_FINEWEB2 = {
    "dup_line_frac": "max_repeated_lines",
    "line_punct_thr": "min_ended_lines",
    "max_avg_word_length": "max_mean_word",
    "min_avg_word_length": "min_mean_word",
    "max_non_alpha_words_ratio": "min_alphabetic",  # its name says the opposite of what it is
    "new_line_ratio": "max_line_breaks",
    "stopwords": "stop_words",
}
_FINEWEB2_GRAMS = {"top_n_grams": "max_top_{}_gram", "dup_n_grams": "max_repeated_{}_grams"}
# What its pipeline sets for all languages: rules that it does without, and one that it loosens.
_FINEWEB2_ALWAYS = {
    "max_repeated_paragraphs": 1.0,
    "max_repeated_line_characters": 1.0,
    "max_repeated_paragraph_characters": 1.0,
    "max_short_lines": 1.0,
    "max_duplicate_characters": 0.1,
}
# Its words in these come from dictionaries; ours are pieces of one length, which say nothing of their mean.
_UNSPACED = ("ja_XX", "zh_CN", "zh_TW", "th_TH", "lo_LA", "km_KH", "my_MM", "my_Qaag")
# The scripts that a language's pages are in; all others: Latn.
_SCRIPTS = {
    **dict.fromkeys(["ar_AR", "fa_IR", "ps_AF", "sd_PK", "ug_CN", "ur_PK"], "Arab"),
    **dict.fromkeys(["be_BY", "bg_BG", "kk_KZ", "ky_KG", "mk_MK", "mn_MN", "ru_RU", "uk_UA"], "Cyrl"),
    **dict.fromkeys(["hi_IN", "mr_IN", "ne_NP", "sa_IN"], "Deva"),
    **dict.fromkeys(["sr_RS", "uz_UZ"], "Cyrl Latn"),
    **{"am_ET": "Ethi", "as_IN": "Beng", "bn_IN": "Beng", "el_GR": "Grek", "gu_IN": "Gujr", "he_IL": "Hebr"},
    **{"hy_AM": "Armn", "ja_XX": "Jpan", "ka_GE": "Geor", "km_KH": "Khmr", "kn_IN": "Knda", "ko_KR": "Hang"},
    **{"lo_LA": "Laoo", "ml_IN": "Mlym", "my_MM": "Mymr", "or_IN": "Orya", "pa_IN": "Guru", "si_LK": "Sinh"},
    **{"ta_IN": "Taml", "te_IN": "Telu", "th_TH": "Thai", "yi_DE": "Hebr", "zh_CN": "Hani Hans", "zh_TW": "Hani Hant"},
}


class ThresholdError(ValueError):
    """What a person has to mend in files of thresholds, one line per problem."""

    def __init__(self, problems: list[str]):
        super().__init__("\n".join(problems))
        self.problems = problems


def thresholds(path: str = "") -> dict[str, Thresholds]:
    """Those of every language: the papers', then what the file or folder at `path` says; ThresholdError."""
    return dict(_thresholds(path, _stamp(Path(path))) if path else _built_in())


@functools.cache
def _built_in() -> dict[str, Thresholds]:
    return {language: Thresholds(**_BUILT_IN.get(language, {})) for language in LANGUAGES}


@functools.lru_cache(maxsize=4)
def _thresholds(path: str, stamp: object) -> dict[str, Thresholds]:
    given, problems = _fineweb2(Path(path)) if Path(path).is_dir() else _toml(Path(path))
    if problems:
        raise ThresholdError(problems)
    everywhere = given.pop("default", {})
    return {
        language: replace(found, **{**everywhere, **_BUILT_IN.get(language, {}), **given.get(language, {})})
        for language, found in _built_in().items()
    }


def _stamp(path: Path) -> object:
    """What changes when the files do."""
    files = sorted(path.glob("*.yml")) if path.is_dir() else [path]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.exists())


def described(path: str) -> str:
    """All thresholds as text, for the digest of a recipe: what the files say counts, not where they lie."""
    return json.dumps({language: asdict(found) for language, found in thresholds(path).items()}, sort_keys=True)


def _toml(path: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The thresholds in a TOML file."""
    if not path.exists():
        return {}, [f"filter.thresholds: {path} does not exist (from {Path.cwd()}); give a TOML file, or a folder"
                    " with FineWeb-2's .yml files"]  # fmt: skip
    return _sections(path, _wrong)


def numbers(path: str, ranges: Mapping[str, tuple[float, float]]) -> dict[str, dict[str, float]]:
    """A TOML file's numbers per language, those of [default] for all that it does not name; ThresholdError.

    `ranges`: the numbers that a language may have, lowest and highest value of each.
    """

    def wrong(where: str, key: str, value: Any) -> str:
        if key not in ranges:
            return f"{where} unknown key {key}; there are {', '.join(ranges)}"
        low, high = ranges[key]
        fits = type(value) in (int, float) and low <= value <= high
        return "" if fits else f"{where} {key} = {value!r} must be a number from {low:g} to {high:g}"

    given, problems = _sections(Path(path), wrong)
    if problems:
        raise ThresholdError(problems)
    everywhere = given.pop("default", {})
    codes = LANGUAGES if everywhere else given
    return {language: everywhere | given.get(language, {}) for language in codes}


def _sections(path: Path, wrong: Callable[[str, str, Any], str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Sections [default] and [de_DE], ... of a TOML file, and what is wrong with them."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        return {}, [f"{path}: is not valid TOML: {error}; mend it there"]
    problems: list[str] = []
    for section, values in raw.items():
        if section not in ("default", *LANGUAGES) or not isinstance(values, dict):
            near = from_iso(section) or next(iter(difflib.get_close_matches(section, LANGUAGES, n=1)), "de_DE")
            problems.append(f"{path}: [{section}] is no language of xlscale.languages; write [{near}] or [default]")
            continue
        values |= {"stop_words": tuple(values["stop_words"])} if isinstance(values.get("stop_words"), list) else {}
        problems += [found for key, value in values.items() if (found := wrong(f"{path}: [{section}]", key, value))]
    return raw, problems


def _wrong(where: str, key: str, value: Any) -> str:
    """What is wrong with a threshold, or nothing."""
    if key not in FIELDS:
        near = difflib.get_close_matches(key, FIELDS, n=1, cutoff=0.5)
        return f"{where} unknown key {key}; " + (
            f"did you mean {near[0]}?" if near else f"there are {', '.join(FIELDS)}"
        )
    if key == "stop_words":
        fits = isinstance(value, tuple) and all(isinstance(word, str) for word in value)
        return "" if fits else f"{where} stop_words = {value!r} must be a list of strings"
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        return f"{where} {key} = {value!r} must be a number from 0"
    return ""


def _fineweb2(folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """A folder of FineWeb-2's files; its language_score is GlotLID's and is left out.

    Where several of its languages are one of ours (Bokmål and Nynorsk), a page passes that passes either:
    the looser threshold counts, and the stop words are put together.
    """
    given: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for path in sorted(folder.glob("*_*.yml")):
        name, script = path.stem.split("_")[:2]
        language = from_iso(name, script)
        if language is None or script not in _SCRIPTS.get(language, "Latn").split():
            continue
        try:
            raw = yaml.safe_load(path.read_text("utf-8"))
            found = _from_fineweb2(raw)
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
            problems.append(f"{path}: is not one of FineWeb-2's files ({' '.join(str(error).split())}); fetch it anew")
            continue
        problems += [what for key, value in found.items() if (what := _wrong(f"{path}:", key, value))]
        if language in _UNSPACED:
            found = {key: value for key, value in found.items() if not key.endswith("_mean_word")}
        # It has one file for Chinese in both of its scripts.
        for code in (language, "zh_TW") if (language, script) == ("zh_CN", "Hani") else (language,):
            given[code] = _looser(given[code], found) if code in given else found
    if not given and not problems:
        problems.append(f"filter.thresholds: {folder} has no file like deu_Latn.yml; give FineWeb-2's folder configs/")
    return given, problems


def _from_fineweb2(raw: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict(_FINEWEB2_ALWAYS)
    for theirs, value in raw.items():
        if theirs in _FINEWEB2:
            found[_FINEWEB2[theirs]] = value
        elif theirs in _FINEWEB2_GRAMS:
            found |= {_FINEWEB2_GRAMS[theirs].format(size): share for size, share in value}
    found = {key: 0 if value == -1 else value for key, value in found.items()}  # -1: no such rule
    found["stop_words"] = tuple(word.lower() for word in found.get("stop_words") or ())
    return found


def _looser(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    result = one | other
    for key in one.keys() & other.keys():
        if key == "stop_words":
            result[key] = tuple(dict.fromkeys(one[key] + other[key]))
        else:
            result[key] = (min if key.startswith("min_") else max)(one[key], other[key])
    return result
