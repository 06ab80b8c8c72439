"""The list of languages and the ways to it."""

import re

import pytest

from xlscale.languages import LANGUAGES, from_iso, language_id

# The 81 languages of facebook/xmod-base, by its config's names.
XMOD = """
    en_XX id_ID vi_VN ru_RU fa_IR sv_SE ja_XX fr_XX de_DE ro_RO ko_KR hu_HU es_XX fi_FI uk_UA da_DK
    pt_XX no_XX th_TH pl_PL bg_BG nl_XX zh_CN he_IL el_GR it_IT sk_SK hr_HR tr_TR ar_AR cs_CZ lt_LT
    hi_IN zh_TW ca_ES ms_MY sl_SI lv_LV ta_IN bn_IN et_EE az_AZ sq_AL sr_RS kk_KZ ka_GE tl_XX ur_PK
    is_IS hy_AM ml_IN mk_MK be_BY la_VA te_IN eu_ES gl_ES mn_MN kn_IN ne_NP sw_KE si_LK mr_IN af_ZA
    gu_IN cy_GB eo_EO km_KH ky_KG uz_UZ ps_AF pa_IN ga_IE ha_NG am_ET lo_LA ku_TR so_SO my_MM or_IN
    sa_IN
"""


def test_there_are_the_100_languages_of_xlm_r_among_them_all_of_xmod() -> None:
    assert len(LANGUAGES) == len(set(LANGUAGES)) == 100
    xmod = XMOD.split()
    assert len(xmod) == 81
    assert set(xmod) <= set(LANGUAGES)
    assert [language_id(code) for code in LANGUAGES] == list(range(100))


def test_every_name_can_be_a_module_name() -> None:
    assert all(re.fullmatch(r"[a-z]{2}_([A-Z]{2}|[A-Z][a-z]{3})", code) for code in LANGUAGES)


def test_every_code_of_ours_leads_to_itself() -> None:
    assert [from_iso(code) for code in LANGUAGES] == list(LANGUAGES)


@pytest.mark.parametrize(
    ("code", "ours"),
    [
        ("en", "en_XX"), ("eng", "en_XX"), ("EN", "en_XX"), ("de-AT", "de_DE"), ("deu_1996", "de_DE"),
        ("ger", "de_DE"), ("zh", "zh_CN"), ("zho", "zh_CN"), ("cmn_hans", "zh_CN"), ("cmn_hant", "zh_TW"),
        ("zh-Hant", "zh_TW"), ("zh-hk", "zh_TW"), ("zh-Hans-HK", "zh_CN"), ("nb", "no_XX"),
        ("nno", "no_XX"), ("iw", "he_IL"), ("jw", "jv_ID"), ("arb", "ar_AR"), ("pes", "fa_IR"),
        ("swh", "sw_KE"), ("srp_latn", "sr_RS"), ("hi-Latn", "hi_Latn"), ("fil", "tl_XX"), ("yue", None),
        ("ckb", None), ("ku-Arab", None), ("xx", None), ("und", None), ("", None),
    ],
)  # fmt: skip
def test_other_peoples_codes_lead_to_ours_or_to_none(code: str, ours: str | None) -> None:
    assert from_iso(code) == ours


def test_a_script_of_its_own_goes_before_the_code() -> None:
    assert from_iso("zh", script="Hant") == "zh_TW"
    assert from_iso("zh-TW", script="hans") == "zh_CN"


def test_an_unknown_language_is_refused_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"'de' is not one of .* did you mean 'de_DE'"):
        language_id("de")
    with pytest.raises(ValueError, match=r"'en_US' .* did you mean 'en_XX'"):
        language_id("en_US")
