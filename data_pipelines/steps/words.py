"""Words of a text in any script: by spaces and signs, and by characters where a script has no spaces.

Han, Kana, Thai, Lao, Khmer, Myanmar, Tibetan and Javanese have no spaces between words. There a piece is what is read
as one (a character with all that stands on, under or around it; in Tibetan, where a dot ends each, a
syllable), and a word is two of them: about as long as words are. Katakana writes names and loanwords: a run
of it is one. No dictionary and no model, so it is the same everywhere and as fast as a regular expression.
"""

import re
import unicodedata


def _marks() -> str:
    """Ranges of all combining marks, for a character class: to the module `re` they are no part of words."""
    found: list[list[int]] = []
    for code in range(0x300, 0x20000):
        if unicodedata.category(chr(code)).startswith("M"):
            if found and found[-1][1] == code - 1:
                found[-1][1] = code
            else:
                found.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in found)


MARKS = _marks()
HAN = "\u3005\u3007\u3105-\u312f\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
HIRAGANA, KATAKANA = "\u3041-\u309f", "\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
THAI_LAO = "\u0e01-\u0e3a\u0e40-\u0e4e\u0e81-\u0ece\u0edc-\u0edf"
KHMER, MYANMAR = "\u1780-\u17d3\u17dd", "\u1000-\u103f\u1050-\u108f\u109a-\u109f\ua9e0-\ua9fe\uaa60-\uaa7f"
TIBETAN, JAVANESE = "\u0f00\u0f40-\u0fbc", "\ua980-\ua9c0\ua9cf"
UNSPACED = HAN + HIRAGANA + KATAKANA + THAI_LAO + KHMER + MYANMAR + TIBETAN + JAVANESE

_BURMESE = rf"[\u1000-\u1021\u1025\u1027\u103f\u1050-\u1055\uaa60-\uaa6f](?:\u1039[\u1000-\u1021]|[{MARKS}])*"
# script -> (piece, pieces in a word)
_SCRIPTS = {
    "Han": (f"[{HAN}][{MARKS}]*", 2),
    "Hiragana": (f"[{HIRAGANA}][{MARKS}]*", 2),
    "Katakana": (f"[{KATAKANA}]+", 1),
    # A vowel that is written before its consonant, the consonant with its marks, a vowel that follows.
    "Thai, Lao": (f"[\u0e40-\u0e44\u0ec0-\u0ec4]?[\u0e01-\u0e2e\u0e81-\u0eae\u0edc-\u0edf][{MARKS}]*"
                  "[\u0e2f\u0e30\u0e32\u0e33\u0e45\u0eaf\u0eb0\u0eb2\u0eb3\u0ebd]*", 2),
    "Khmer": (f"[\u1780-\u17b3](?:\u17d2[\u1780-\u17b3]|[{MARKS}])*", 2),
    # With the consonants that end the syllable: an asat (103a) stands on them.
    "Myanmar": (rf"{_BURMESE}(?:[\u1000-\u1021]\u1037?\u103a[{MARKS}]*)*", 2),
    "Tibetan": (f"[{TIBETAN}]+", 1),
    # A consonant with its vowel and, below the pangkon (a9c0), those that it is written together with.
    "Javanese": (f"[\ua984-\ua9b2](?:\ua9c0[\ua984-\ua9b2]|[{MARKS}])*", 2),
}  # fmt: skip
_LETTER = rf"[^\W{UNSPACED}]"
# Letters and digits with marks; apostrophes, hyphens and the like only between letters.
_WORD = rf"{_LETTER}+(?:(?:[{MARKS}]|['\u2019\-\u00b7\u05f3\u05f4\u200c\u200d](?={_LETTER}))+{_LETTER}*)*"
_REST = rf"[{UNSPACED}]|{_WORD}"
_PIECES = re.compile("|".join([*(piece for piece, _ in _SCRIPTS.values()), _REST]))
_WORDS = re.compile("|".join([*(f"(?:{piece}){{1,{count}}}" for piece, count in _SCRIPTS.values()), _REST]))
_NO_SPACES = re.compile(f"[{UNSPACED}]")


def words(text: str) -> list[str]:
    """The words of a text, without the signs between them."""
    return _WORDS.findall(text)


def pieces(text: str) -> list[str]:
    """As words(), but single pieces where there are no spaces: what repeats is then found at any place."""
    return _PIECES.findall(text)


def is_unspaced(word: str) -> bool:
    """Whether a word is, or begins, in a script without spaces."""
    return bool(_NO_SPACES.match(word))
