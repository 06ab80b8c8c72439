"""Burmese in the Zawgyi encoding, told from Unicode by signs that only one of the two writes.

Both use the same code points (U+1000 to U+109F), with other meanings: in Zawgyi U+1039 is the visible asat and U+1031 a
vowel that is typed before its consonant; in Unicode U+1039 only stacks the next consonant, U+103A is the asat, and
U+1031 comes after its consonant. Shan, Mon and Karen have letters of their own behind those of Burmese.
"""

import re

_CONSONANT = "\u1000-\u1021"
# An asat before what is no consonant; a vowel that stands first, or after the end of a syllable, before its consonant.
_ZAWGYI = re.compile(
    f"\u1039(?![{_CONSONANT}\u103f])|(?:^|[^\u1000-\u109f]|[\u102b-\u1030\u1032-\u1038])\u1031(?=[{_CONSONANT}\u103b\u107e-\u1084])"
)
# An asat and a tone on one consonant; a vowel before what is no consonant, so that its own came before it.
_UNICODE = re.compile(f"\u103a\u1038|[{_CONSONANT}\u103b-\u103e]\u1031(?![{_CONSONANT}\u103b\u107e-\u1084])")


_BURMESE, _OTHERS = re.compile("[\u1000-\u104f]"), re.compile("[\u1050-\u109f]")
MAX_OTHERS = 0.02  # share of letters of other languages: none in the Burmese declaration, .08 in Mon's, .38 in Shan's


def burmese(text: str) -> str | None:
    """my_Qaag for text with more signs of Zawgyi than of Unicode, my_MM for Burmese, None for others of its script."""
    if len(_ZAWGYI.findall(text)) > len(_UNICODE.findall(text)):
        return "my_Qaag"
    others, ours = len(_OTHERS.findall(text)), len(_BURMESE.findall(text))
    return None if others > MAX_OTHERS * (others + ours) else "my_MM"
