"""C4's rules for single lines (Raffel et al. 2020, section 2.2), with the signs of all scripts and our words."""

import re

from data_pipelines.steps.thresholds import Thresholds
from data_pipelines.steps.words import words

# What ends a sentence in Latin, Greek, Armenian, Arabic, Indic, Ethiopic, Khmer, Burmese, Tibetan, Javanese, Chinese.
ENDS = (
    r".!?\u2026\u037e\u0589\u061f\u06d4\u0964\u0965\u1362\u1367\u1368\u17d4\u17d5\u104a\u104b\u0f0d\u0f0e\ua9c9"
    r"\u3002\uff01\uff0e\uff1f\uff61\u203c\u2047-\u2049"
)
CLOSING = r"\"'\u201d\u2019\u00bb\u203a)\]\u300d\u300f\uff09\u3011\u3009\u300b"
LINE_END = re.compile(f"[{ENDS}{CLOSING}]\u1361?$")  # Ethiopic may put its space between words there too
_ELLIPSIS = ("...", "\u2026")
# Notices about cookies and privacy; C4 has them in English only.
_NOTICE = re.compile(
    "|".join(
        (
            "terms of use", "privacy policy", "cookie policy", "(?:uses?|use of|using|accept) cookies",
            "datenschutzerklärung", "(?:verwende[nt]|nutz(?:t|en)|verwendung von) cookies",
            "politique de confidentialité", "utilis(?:e|ons|ation) (?:des|de) cookies",
            "política de (?:privacidad|privacidade|cookies)", "(?:utiliza(?:mos)?|usa(?:mos)?|uso de) cookies",
            "informativa sulla privacy", "(?:utilizza(?:no)?|uso dei|utilizziamo) (?:i )?cookie",
            "privacybeleid", "(?:gebruikt|gebruik van) cookies", "polity[kc][aią] (?:prywatności|cookies)",
            "(?:używa|wykorzystuje|korzysta z) (?:plików )?cookies?", "политик[аиуе] конфиденциальности",
            "использу(?:ет|ем|ют) (?:файлы )?cookies?", "çerez politikas\u0131", "gizlilik politikas\u0131",
            "隐私政策", "隱私權政策", "プライバシーポリシー", "개인정보 ?처리방침",
        )
    )
)  # fmt: skip


def is_kept(line: str, limits: Thresholds) -> bool:
    """Whether a line is a sentence of the page: it ends as one, has words enough, and is no notice."""
    folded = line.lower()
    return bool(
        (not limits.need_line_end or (LINE_END.search(line) and not line.endswith(_ELLIPSIS)))
        and len(words(line)) >= limits.min_line_words
        and "javascript" not in folded
        and not _NOTICE.search(folded)
    )


def kept_lines(text: str, limits: Thresholds) -> tuple[str, int]:
    """(text, lines taken out)."""
    lines = text.split("\n")
    out = [bool(line) and not is_kept(line, limits) for line in lines]
    if not any(out):
        return text, 0
    kept = "\n".join(line for line, gone in zip(lines, out, strict=True) if not gone)
    return re.sub(r"\n{3,}", "\n\n", kept).strip("\n"), sum(out)
