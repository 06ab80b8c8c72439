"""Words in any script, and the published rules with thresholds per language."""

import json
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from data_pipelines.config import RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.config_rules import CHOICES
from data_pipelines.steps.document import REASONS, dropped
from data_pipelines.steps.quality import RULES, CheckQuality, Measures
from data_pipelines.steps.thresholds import Thresholds, thresholds
from data_pipelines.steps.words import pieces, words
from tests.test_pipeline_steps import archive, declarations, document, page, record
from tests.test_words import SPACELESS
from xlscale.languages import LANGUAGES

# In the form of FineWeb-2's files, numbers ours.
FINEWEB2 = """dup_line_frac: 0.25
dup_n_grams:
- - 5
  - 0.14
- - 6
  - 0.13
language_score: 0.8
line_punct_thr: {ended}
max_avg_word_length: 14
max_non_alpha_words_ratio: 0.77
min_avg_word_length: {shortest}
new_line_ratio: 0.15
stopwords:
- {stop}
- "f\\xFCr"
top_n_grams:
- - 2
  - 0.17
"""


def test_words_of_scripts_with_spaces_keep_marks_apostrophes_and_joiners():
    assert words("It's a well-known “fact”: 3.14 -- ok!?") == ["It's", "a", "well-known", "fact", "3", "14", "ok"]
    assert words("हिन्दी में, লেখা। தமிழ்") == ["हिन्दी", "में", "লেখা", "தமிழ்"]
    assert words("대한민국은 민주공화국이다.") == ["대한민국은", "민주공화국이다"]
    assert words("می\u200cخواهم، שלום") == ["می\u200cخواهم", "שלום"]
    assert words("e\u0301te\u0301 ሰው፡ነው።") == ["e\u0301te\u0301", "ሰው", "ነው"]


def test_words_of_scripts_without_spaces_are_pieces_that_never_cut_a_syllable():
    assert words("すべての人間は、コンピューターを2026年に") == [
        "すべ", "ての", "人間", "は", "コンピューター", "を", "2026", "年", "に"]  # fmt: skip
    assert words("在尊严和权利上。一律") == ["在尊", "严和", "权利", "上", "一律"]
    assert pieces("မြန်မာနိုင်ငံ") == ["မြန်", "မာ", "နိုင်", "ငံ"]
    assert pieces("เกิดมามีอิสระ") == ["เกิ", "ด", "มา", "มี", "อิ", "ส", "ระ"]
    assert pieces("ក្នុងផ្នែក") == ["ក្នុ", "ង", "ផ្នែ", "ក"]
    assert words("འགྲོ་བ་མིའི་རིགས") == ["འགྲོ", "བ", "མིའི", "རིགས"]


@pytest.mark.parametrize("code", SPACELESS)
def test_no_letter_is_lost_and_words_are_about_as_long_as_words(code):
    text = SPACELESS[code]
    assert "".join(pieces(text)) == "".join(words(text))
    assert [c for c in text if c.isalpha()] == [c for c in "".join(words(text)) if c.isalpha()]
    assert 1 < len("".join(words(text))) / len(words(text)) < 7


def broken(name: str, text: str, **limits: object) -> list[str]:
    """The reasons of a set that a text is dropped for."""
    measures, given = Measures(text), Thresholds(**limits)
    return [reason for reason, holds in RULES[name].items() if holds(measures, given)]


def test_every_rule_drops_what_it_is_for_with_a_reason_and_nothing_else_of_its_set():
    english = declarations()["eng"][0]
    prose = english[english.index("Whereas recognition") :][:3000]
    short = "\n".join(f"The {word} is here." for word in dict.fromkeys(words(english.lower())) if len(word) > 4)
    cases = {
        "gopher_few_words": "Only a few words stand here.",
        "gopher_short_words": "a be " * 60,
        "gopher_long_words": "incomprehensibilities " * 60,
        "gopher_hashes": prose.replace(" the ", " # the # "),
        "gopher_ellipses": prose.replace(" the ", " the... the… "),
        "gopher_bullets": "\n".join(f"- {line}" for line in prose.split("\n")),
        "gopher_ellipsis_lines": "\n".join(f"{line}…" for line in prose.split("\n")),
        "gopher_not_alphabetic": prose.replace(" the ", " 125 338 ").replace(" of ", " 125 338 "),
        "gopher_repeated_lines": f"{prose}\n" + "\n".join(["The same line again."] * 60),
        "gopher_repeated_paragraphs": f"{english}\n\n" + "\n\n".join([english[:4000]] * 2),
        "gopher_top_gram": f"{prose}\n" + "buy this " * 120,
        "gopher_repeated_grams": " ".join(prose.split()[:200] * 2),
        "c4_lorem_ipsum": f"{prose} Lorem  ipsum, lorem ipsum dolor.",
        "c4_curly_bracket": f"{prose} {{ }}",
        "c4_few_sentences": prose.replace(".", ","),
        "mc4_few_long_lines": short,
        "fineweb_ended_lines": prose.replace(".\n", "\n").replace(".", ","),
        "fineweb_short_lines": short,
        "fineweb_duplicate_lines": f"{english}\n{english[4000:4600]}",
        "fineweb_line_breaks": "\n".join(prose.split()),
    }
    limits = {"max_words": 10_000, "stop_words": ("the", "of")}
    for name, rules in RULES.items():
        assert broken(name, english, **limits) == [], name
        for reason in rules:
            if reason in cases:
                assert reason in broken(name, cases[reason], **limits), reason
    assert broken("gopher", english, max_words=1000) == ["gopher_many_words"]
    assert broken("gopher", english, stop_words=("der", "die", "das")) == ["gopher_stop_words"]
    assert broken("gopher", english, stop_words=("der", "the", "and")) == []
    assert broken("gopher", english, stop_words=("der",)) == []  # fewer than min_stop_words of them: no rule


def test_stop_words_are_found_inside_text_without_spaces():
    assert Measures("人間は、理性と良心とを").stop_words(("は", "と", "ない")) == 2
    assert Measures("The others").stop_words(("the", "other")) == 1


def test_all_declarations_of_two_thousand_letters_pass_all_rules_in_every_language():
    checked = set()
    step = CheckQuality(list(RULES))
    for name, (text, language, _) in declarations().items():
        if language in LANGUAGES and len(text) > 2000 and "{" not in text:
            kept = document(text, language=language)
            step.process(kept)
            assert not dropped(kept), (name, kept.metadata)
            checked.add(language)
    assert len(checked) >= 80


@pytest.mark.parametrize("code", ["ja", "th", "zh", "my", "km", "lo"])
def test_repetition_is_found_wherever_it_starts_in_scripts_without_spaces(code):
    once = SPACELESS[code]
    again = "".join(pieces(once))
    plain, twice = Measures(once), Measures(once + "".join(pieces(once)[:1]) + again)
    assert plain.repeated_grams(5) < 0.1
    assert twice.repeated_grams(5) > 0.4


def test_top_gram_is_the_share_of_the_characters_that_the_most_frequent_words_take():
    assert Measures("one two three four five six").top_gram(2) == 0
    assert Measures("ab cd ef ab cd gh").top_gram(2) == pytest.approx(8 / 12)
    assert Measures("ab cd ef ab cd ef").repeated_grams(3) == pytest.approx(0.5)
    assert Measures("").top_gram(2) == Measures("").repeated_grams(5) == 0


def test_every_rule_has_its_reason_and_every_set_its_name_in_a_recipe():
    assert tuple(RULES) == CHOICES["filter.rules"]
    reasons = [reason for rules in RULES.values() for reason in rules]
    assert len(reasons) == len(set(reasons))
    assert set(reasons) <= REASONS["quality"].keys()


def test_thresholds_of_a_file_go_before_the_papers_and_languages_it_does_not_name_have_theirs(tmp_path):
    path = tmp_path / "thresholds.toml"
    path.write_text('[default]\nmin_words = 20\nmax_mean_word = 11\n[de_DE]\nmin_words = 30\nstop_words = ["der"]\n')
    found, papers = thresholds(str(path)), thresholds()
    assert set(found) == set(papers) == set(LANGUAGES)
    assert (found["de_DE"].min_words, found["fr_XX"].min_words, papers["fr_XX"].min_words) == (30, 20, 50)
    assert found["de_DE"].stop_words == ("der",)
    assert (found["fr_XX"].max_mean_word, found["ta_IN"].max_mean_word) == (11, papers["ta_IN"].max_mean_word)
    assert papers["th_TH"].min_ended_lines == 0 < papers["fr_XX"].min_ended_lines


def test_all_that_is_wrong_in_a_file_of_thresholds_is_said_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("[de]\nmin_words = 3\n[fr_XX]\nmin_wordz = 3\nmax_hashes = true\nstop_words = 3\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[run]\noutput = "x"\n[read]\narchives = ["y"]\n[filter]\nrules = ["gopher", "gofer"]\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [f"filter.thresholds={path}"])
    text = "\n".join(caught.value.problems)
    for part in (
        "filter.rules = 'gofer' must be one of gopher, gopher_repetition, c4_lines, c4, mc4, fineweb",
        "[de] is no language of xlscale.languages; write [de_DE] or [default]",
        "[fr_XX] unknown key min_wordz; did you mean min_words?",
        "[fr_XX] max_hashes = True must be a number from 0",
        "[fr_XX] stop_words = 3 must be a list of strings",
    ):
        assert part in text, part
    with pytest.raises(RecipeError, match=r"no effect without filter\.rules"):
        load_recipe(recipe, [f"filter.thresholds={path}", "filter.rules=[]"])
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(recipe, ["filter.thresholds=nowhere.toml", "filter.rules=['c4']"])


def test_files_in_the_form_of_fineweb2_are_read(tmp_path):
    for name, ended, shortest, stop in (
        ("deu_Latn", 0.1, 0, "Der"), ("nob_Latn", 0.2, 4, "og"), ("nno_Latn", 0.1, 5, "ikkje"),
        ("jpn_Jpan", 0.1, 3, "の"), ("cmn_Hani", -1, 2, "的"), ("arb_Latn", 0.9, 1, "al"), ("tpi_Latn", 0.9, 1, "em"),
    ):  # fmt: skip
        (tmp_path / f"{name}.yml").write_text(FINEWEB2.format(ended=ended, shortest=shortest, stop=stop))
    found, papers = thresholds(str(tmp_path)), thresholds()
    german = found["de_DE"]
    assert (german.max_repeated_5_grams, german.max_top_2_gram, german.max_mean_word) == (0.14, 0.17, 14)
    assert (german.min_ended_lines, german.max_line_breaks, german.min_alphabetic) == (0.1, 0.15, 0.77)
    assert german.stop_words == ("der", "für")
    assert german.max_short_lines == 1  # FineWeb-2 does without this rule
    norwegian = found["no_XX"]  # the looser of two files
    assert (norwegian.min_ended_lines, norwegian.min_mean_word) == (0.1, 4)
    assert set(norwegian.stop_words) == {"og", "ikkje", "für"}
    assert found["ja_XX"].min_mean_word == papers["ja_XX"].min_mean_word  # its words are not ours
    assert found["zh_TW"].min_ended_lines == found["zh_CN"].min_ended_lines == 0  # -1: no such rule
    assert found["ar_AR"] == papers["ar_AR"]  # another script
    (tmp_path / "fra_Latn.yml").write_text("- no\n")
    with pytest.raises(ValueError, match=r"fra_Latn\.yml: is not one of FineWeb-2's files"):
        thresholds(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no file like deu_Latn"):
        thresholds(str(tmp_path / "empty"))


def test_recipe_with_rules_counts_their_reasons_and_runs_anew_when_a_threshold_changes(tmp_path: Path, capsys):
    text = declarations()["deu_1996"][0]
    lines = [line for line in text.split("\n") if len(line) > 40]
    records = [record(f"http://a.test/{i}", page("\n".join(lines[i : i + 6])).encode()) for i in range(0, 60, 6)]
    code = "\n".join([*lines[3:9], "Er schrieb {x} an die Wand."])
    archive(tmp_path / "a.warc.gz", [*records, record("http://a.test/code", page(code).encode())])
    limits = tmp_path / "limits.toml"
    limits.write_text("[default]\nmin_sentences = 1\n")
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\noutput = "{tmp_path}/out"\n[read]\narchives = ["{tmp_path}/a.warc.gz"]\n'
                      f'[filter]\nrules = ["c4"]\nthresholds = "{limits}"\n')  # fmt: skip
    assert main([str(recipe)]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["dropped"]["c4_curly_bracket"] == report["languages"]["de_DE"]["dropped"]["c4_curly_bracket"] == 1
    assert (tmp_path / "out/dropped/c4_curly_bracket.jsonl").exists()
    assert "as program code does (C4)" in capsys.readouterr().out
    limits.write_text("[default]\nmin_sentences = 1\n# a remark changes nothing\n")
    assert main([str(recipe)]) == 0
    assert "up to date" in capsys.readouterr().out
    limits.write_text("[de_DE]\nmin_sentences = 7\n")
    assert main([str(recipe)]) in (0, 2)
    assert "up to date" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("language", "kept", "out"),
    [
        ("en_XX", ["He said “all is well.”", "Is this (or that) a question?"],
         ["Home | News | About us and more", "Only four words here.", "Read on and see what happened...",
          "Please enable JavaScript to see this page.", "This site uses cookies to be a better site.",
          "Our Terms of Use and our rules hold here."]),
        ("de_DE", ["Alle Menschen sind frei und gleich geboren."],
         ["Diese Seite verwendet Cookies, damit alles besser wird.", "Alle Menschen sind frei und gleich,"]),
        ("zh_CN", ["人人生而自由，在尊严和权利上一律平等。"], ["在尊严和权利上一律平等", "人人平等。"]),
        ("hi_IN", ["सभी मनुष्यों को गौरव और अधिकारों में जन्मजात स्वतन्त्रता है।"], ["सभी मनुष्यों को गौरव और अधिकारों में"]),
        ("ar_AR", ["هل يولد جميع الناس أحرارا متساوين؟"], ["يولد جميع الناس أحرارا متساوين،"]),
        ("am_ET", ["የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና፡እኩልነት፡ያለው፡ነው።፡"], ["የሰው፡ልጅ፡ሁሉ፡ሲወለድ፡ነጻና፡በክብርና"]),
        ("th_TH", ["มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกัน"], ["มนุษย์"]),  # no full stop in Thai
    ],
)  # fmt: skip
def test_lines_that_are_no_sentences_or_notices_are_taken_out_and_counted_in_any_script(language, kept, out):
    page = document("\n".join([*out, *kept]), language=language)
    CheckQuality(["c4_lines"]).process(page)
    assert page.text.split("\n") == kept
    assert page.metadata["removed_lines"] == len(out)
    nothing = document("\n".join(out), language=language)
    CheckQuality(["c4_lines"]).process(nothing)
    assert (nothing.text, nothing.metadata["dropped"]) == ("", "c4_no_lines")


def test_thresholds_of_a_language_decide_which_lines_stay(tmp_path):
    path = tmp_path / "limits.toml"
    path.write_text("[en_XX]\nmin_line_words = 3\nneed_line_end = 0\n")
    page = document("Three words stay\n\n\nTwo words\n\n\nAnd these four words.", language="en_XX")
    CheckQuality(["c4_lines"], str(path)).process(page)
    assert page.text == "Three words stay\n\nAnd these four words."
