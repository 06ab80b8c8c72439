"""The one ordered list of languages, named as X-MOD names them, and the way to it from others."""

import difflib
import re

# Our code: its ISO 639-3 code, then what else means it (members of a macrolanguage, retired codes).
# Append only: an id is a position. A name becomes a module's name: letters and one underscore, no dot.
# 81 names are X-MOD's own; the other 19 languages of XLM-R are named alike, a second script by its ISO 15924
# code (Latn: romanised; Qaag: Burmese in the Zawgyi encoding).
_CODES = {
    "af_ZA": "afr", "am_ET": "amh", "ar_AR": "ara arb", "as_IN": "asm", "az_AZ": "aze azj azb",
    "be_BY": "bel", "bg_BG": "bul", "bn_IN": "ben", "bn_Latn": "", "br_FR": "bre", "bs_BA": "bos",
    "ca_ES": "cat", "cs_CZ": "ces cze", "cy_GB": "cym wel", "da_DK": "dan", "de_DE": "deu ger",
    "el_GR": "ell gre", "en_XX": "eng", "eo_EO": "epo", "es_XX": "spa", "et_EE": "est ekk",
    "eu_ES": "eus baq", "fa_IR": "fas per pes prs", "fi_FI": "fin", "fr_XX": "fra fre", "fy_NL": "fry",
    "ga_IE": "gle", "gd_GB": "gla", "gl_ES": "glg", "gu_IN": "guj", "ha_NG": "hau", "he_IL": "heb iw",
    "hi_IN": "hin", "hi_Latn": "", "hr_HR": "hrv", "hu_HU": "hun", "hy_AM": "hye arm", "id_ID": "ind in",
    "is_IS": "isl ice", "it_IT": "ita", "ja_XX": "jpn", "jv_ID": "jav jw", "ka_GE": "kat geo", "kk_KZ": "kaz",
    "km_KH": "khm", "kn_IN": "kan", "ko_KR": "kor", "ku_TR": "kur kmr", "ky_KG": "kir", "la_VA": "lat",
    "lo_LA": "lao", "lt_LT": "lit", "lv_LV": "lav lvs", "mg_MG": "mlg plt", "mk_MK": "mkd mac",
    "ml_IN": "mal", "mn_MN": "mon khk", "mr_IN": "mar", "ms_MY": "msa may zsm zlm", "my_MM": "mya bur",
    "my_Qaag": "", "ne_NP": "nep npi", "nl_XX": "nld dut", "no_XX": "nor nb nn nob nno", "om_ET": "orm gaz",
    "or_IN": "ori ory", "pa_IN": "pan", "pl_PL": "pol", "ps_AF": "pus pbt pbu pst", "pt_XX": "por",
    "ro_RO": "ron rum mo mol", "ru_RU": "rus", "sa_IN": "san", "sd_PK": "snd", "si_LK": "sin",
    "sk_SK": "slk slo", "sl_SI": "slv", "so_SO": "som", "sq_AL": "sqi alb als", "sr_RS": "srp",
    "su_ID": "sun", "sv_SE": "swe", "sw_KE": "swa swh", "ta_IN": "tam", "ta_Latn": "", "te_IN": "tel",
    "te_Latn": "", "th_TH": "tha", "tl_XX": "tgl fil", "tr_TR": "tur", "ug_CN": "uig", "uk_UA": "ukr",
    "ur_PK": "urd", "ur_Latn": "", "uz_UZ": "uzb uzn", "vi_VN": "vie", "xh_ZA": "xho", "yi_DE": "yid ydd ji",
    "zh_CN": "zho chi cmn", "zh_TW": "",
}  # fmt: skip

LANGUAGES: tuple[str, ...] = tuple(_CODES)
"""The 100 languages of XLM-R in the order of their ids."""

_IDS = {code: index for index, code in enumerate(LANGUAGES)}
# setdefault: of a language's two entries the first is the usual script
_BY_ISO: dict[str, str] = {}
for _code, _aliases in _CODES.items():
    for _alias in (_code.split("_")[0], *_aliases.split()):
        _BY_ISO.setdefault(_alias, _code)

# Where the script decides: (language, script) -> our code, None where XLM-R has no such language.
_BY_SCRIPT: dict[tuple[str, str], str | None] = {
    ("zh_CN", "Hant"): "zh_TW",
    ("bn_IN", "Latn"): "bn_Latn",
    ("hi_IN", "Latn"): "hi_Latn",
    ("ta_IN", "Latn"): "ta_Latn",
    ("te_IN", "Latn"): "te_Latn",
    ("ur_PK", "Latn"): "ur_Latn",
    ("my_MM", "Qaag"): "my_Qaag",
    ("ku_TR", "Arab"): None,  # Sorani
    ("pa_IN", "Arab"): None,  # Shahmukhi
}
_TRADITIONAL_CHINESE_REGIONS = {"TW", "HK", "MO"}


def language_id(code: str) -> int:
    """Position of a language in LANGUAGES; ValueError for a code that is not there."""
    if code not in _IDS:
        near = from_iso(code) or next(iter(difflib.get_close_matches(code, LANGUAGES, n=1, cutoff=0.3)), None)
        hint = f"did you mean {near!r}? " if near else ""
        raise ValueError(
            f"language {code!r} is not one of the {len(LANGUAGES)} codes of xlscale.languages; {hint}"
            f"codes look like 'en_XX', 'de_DE', 'zh_TW'"
        )
    return _IDS[code]


def from_iso(code: str, script: str | None = None) -> str | None:
    """Our code for an ISO 639-1, 639-2 or 639-3 code or a BCP-47 tag, None where XLM-R lacks the language.

    Subtags may be joined by - or _ and be of any case (`zh-Hant`, `zh_tw`, `srp_latn`, `deu_1996`); `script`
    (ISO 15924) goes before a script in the tag.
    """
    primary, *subtags = re.split(r"[-_]", code.strip())
    language = _BY_ISO.get(primary.lower())
    if language is None:
        return None
    regions = {tag.upper() for tag in subtags if re.fullmatch(r"[A-Za-z]{2}", tag)}
    scripts = [tag.title() for tag in subtags if re.fullmatch(r"[A-Za-z]{4}", tag)]
    if script:
        scripts = [script.title()]
    if not scripts and language == "zh_CN" and regions & _TRADITIONAL_CHINESE_REGIONS:
        scripts = ["Hant"]
    return _BY_SCRIPT.get((language, scripts[0]), language) if scripts else language
