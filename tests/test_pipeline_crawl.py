"""data_pipelines on a real crawl of 11,587 pages (tests/crawl.py), as WARC and as WET."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import zstandard

from data_pipelines.__main__ import main
from tests.crawl import UnavailableError, known_languages, made
from tests.test_pipeline import DEMO
from xlscale.data.shards import Corpus
from xlscale.languages import from_iso

pytestmark = pytest.mark.slow


class Run(NamedTuple):
    """What became of a crawl."""

    report: dict[str, Any]
    kept: dict[str, dict[str, Any]]
    """Address -> document with its language, of those for training and those held out."""
    dropped: dict[str, dict[str, Any]]
    """Address -> document with its reason, and its language if it was found."""

    languages: dict[str, str]
    """Address -> language that was found."""


@pytest.fixture(scope="module")
def crawl() -> Path:
    try:
        return made()
    except UnavailableError as error:
        pytest.skip(str(error))


def run(archives: str, output: Path) -> Run:
    settings = [f"read.archives=['{archives}']", f"run.output={output}", "run.workers=2", "report.all_dropped=true"]
    assert main([str(DEMO), *(word for setting in settings for word in ("--set", setting))]) == 0
    return outcome(output)


def outcome(output: Path) -> Run:
    corpus, kept, dropped = Corpus.open(output / "shards"), dict[str, Any](), dict[str, Any]()
    for code in corpus.languages:
        held = [json.loads(line) for line in (output / f"heldout/{code}.jsonl").read_bytes().splitlines()]
        kept |= {row["url"]: {**row, "language": code} for row in [*corpus.read(code), *held]}
    for path in (output / "dropped").glob("*/*.jsonl.zst"):
        with path.open("rb") as file:
            rows = io.TextIOWrapper(zstandard.ZstdDecompressor().stream_reader(file), "utf-8")
            for row in map(json.loads, rows):
                facts = row.pop("metadata")
                dropped[facts["url"]] = {**row, **facts, "reason": facts["dropped"]}
    languages = {url: row["language"] for url, row in (kept | dropped).items() if row.get("language")}
    return Run(json.loads((output / "report.json").read_text("utf-8")), kept, dropped, languages)


@pytest.fixture(scope="module")
def warc(crawl, tmp_path_factory) -> Run:
    return run(f"{crawl}/warc/*.warc.gz", tmp_path_factory.mktemp("warc") / "out")


@pytest.fixture(scope="module")
def wet(crawl, tmp_path_factory) -> Run:
    return run(f"{crawl}/wet/*.warc.wet.gz", tmp_path_factory.mktemp("wet") / "out")


def test_every_page_of_the_crawl_is_kept_or_dropped_for_a_reason(crawl, warc, wet):
    known = known_languages(crawl)
    pages = {url for url, (_, kind) in known.items() if kind != "missing"}
    assert len(pages) >= 10_000
    assert warc.kept.keys() | warc.dropped.keys() == known.keys()
    assert wet.kept.keys() | wet.dropped.keys() == pages  # an error has no text
    for found in (warc, wet):
        assert not found.kept.keys() & found.dropped.keys()
        assert len(found.report["archives"]) >= 5
        assert not any(row["faults"] for row in found.report["archives"])
        assert found.report["dropped"] == Counter(row["reason"] for row in found.dropped.values())
        assert sum(row["training"] > 0 for row in found.report["languages"].values()) >= 20
    assert {url for url, row in warc.dropped.items() if row["reason"] == "not_ok"} == known.keys() - pages


@pytest.mark.parametrize("kind", ["warc", "wet"])
def test_declarations_in_languages_of_xlmr_get_their_language(kind, crawl, request):
    found = request.getfixturevalue(kind).languages
    gold = {url: from_iso(tag) for url, (tag, kind) in known_languages(crawl).items() if kind == "udhr"}
    gold = {url: code for url, code in gold.items() if code}
    wrong = {url.split("/")[-1]: (code, found.get(url)) for url, code in gold.items() if found.get(url) != code}
    assert len(gold) >= 130
    assert 1 - len(wrong) / len(gold) >= 0.93, wrong
    print(f"{kind}: {len(gold) - len(wrong)} of {len(gold)} declarations, wrong: {wrong}")


def test_pages_that_mirrors_repeat_stay_once(crawl, warc):
    known = known_languages(crawl)
    guides = {url for url, (_, kind) in known.items() if kind == "guide"}
    reasons = Counter(warc.dropped[url]["reason"] for url in guides & warc.dropped.keys())
    copies = reasons["exact_duplicate"] + reasons["near_duplicate"]
    # Of five architectures four would go if nothing in a page said which it is of.
    assert copies >= 0.65 * len(guides)
    assert reasons["near_duplicate"] >= 0.2 * len(guides)
    everything = warc.report["dropped"]
    print(f"{everything['exact_duplicate']} exact and {everything['near_duplicate']} near duplicates dropped")
    ids = {row["id"] for row in warc.kept.values()}
    near = [row for row in warc.dropped.values() if row["reason"] == "near_duplicate"]
    assert min(row["similarity"] for row in near) >= 0.75
    assert sum(row["duplicate_of"] in ids for row in near) >= 0.99 * len(near)  # the rest: dropped with its language
    sizes = Counter(row.get("cluster_size", 1) for row in warc.kept.values())
    assert sum(sizes[size] for size in range(4, 7)) >= 200


def test_warc_and_wet_agree_on_languages_and_on_the_text_that_both_have(crawl, warc, wet):
    known = known_languages(crawl)
    both = warc.languages.keys() & wet.languages.keys()
    assert len(both) >= 10_000
    differ = {url for url in both if warc.languages[url] != wet.languages[url]}
    # Half-translated pages: menus in the language of the book decide.
    assert len(differ) <= 0.02 * len(both)
    assert {known[url][1] for url in differ} <= {"handbook"}
    # All of the main text is in the text of the whole page; what is masked in one may be there in the other.
    lines = there = 0
    main, all_ = warc.kept | warc.dropped, wet.kept | wet.dropped
    for url in both - differ:
        ours, whole = main[url]["text"], all_[url]["text"]
        if "@example.com" not in ours + whole and "192.0.2.1" not in ours + whole:
            own, theirs = set(ours.split("\n")), set(whole.split("\n"))
            lines, there = lines + len(own), there + len(own & theirs)
    assert lines > 100_000
    assert there >= 0.95 * lines
