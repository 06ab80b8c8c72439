"""data_pipelines, step by step, on archives made here of real pages."""

import gzip
import json
import re
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from datatrove.data import Document

from data_pipelines.config import (
    DeduplicateConfig,
    ExtractConfig,
    FilterConfig,
    HeldoutConfig,
    IdentifyConfig,
    ReadConfig,
)
from data_pipelines.steps.document import REASONS, drop, dropped
from data_pipelines.steps.duplicates import DropExactDuplicates, DropNearDuplicates, SignDocuments
from data_pipelines.steps.extract import ExtractText, find_charset, normalise
from data_pipelines.steps.filter import FilterQuality, letters
from data_pipelines.steps.holdout import HoldOut
from data_pipelines.steps.identify import IdentifyLanguage, Vote, decide
from data_pipelines.steps.read import ReadArchives

SAMPLE = Path(__file__).parents[1] / "data_pipelines/sample"


def record(url: str, body: bytes, head: str = "Content-Type: text/html", status: str = "200 OK") -> bytes:
    """A response record, not compressed."""
    http = f"HTTP/1.1 {status}\r\n{head}\r\n\r\n".encode() + body
    warc = f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: <{url}>\r\nContent-Type: application/http"
    return f"{warc};msgtype=response\r\nContent-Length: {len(http)}\r\n\r\n".encode() + http + b"\r\n\r\n"


def archive(path: Path, records: list[bytes]) -> Path:
    """A .warc.gz: each record a gzip member."""
    path.write_bytes(b"".join(gzip.compress(one, mtime=0) for one in records))
    return path


def page(text: str, head: str = "") -> str:
    """A page of paragraphs."""
    paragraphs = "".join(f"<p>{line}</p>\n" for line in text.split("\n") if line)
    return f"<html><head>{head}<title>t</title></head><body><main>{paragraphs}</main></body></html>"


def read(path: Path, tmp_path: Path, max_faults: int = 3, max_page_bytes: int = 1 << 20) -> tuple[list[Document], Any]:
    """The documents of an archive and what was reported of it."""
    config = ReadConfig(archives=[], max_faults=max_faults, max_page_bytes=max_page_bytes)
    step = ReadArchives([str(path)], config, tmp_path / "found", tmp_path / "progress")
    documents = list(step.run())
    return documents, json.loads((tmp_path / "found/00000.jsonl").read_text())


@cache
def declarations() -> dict[str, tuple[str, str, str]]:
    """name of the declaration -> (text, label or reason, charset), from the sample."""
    with tempfile.TemporaryDirectory() as folder:
        step = ReadArchives([str(SAMPLE / "udhr.warc.gz")], ReadConfig(archives=[]), Path(folder), Path(folder))
        data = IdentifyLanguage(IdentifyConfig()).run(ExtractText(ExtractConfig()).run(step.run()))
        return {
            d.metadata["url"].split("/")[-1].removesuffix(".html"): (
                d.text, d.metadata.get("language") or d.metadata["dropped"], d.metadata["charset"])
            for d in data
        }  # fmt: skip


def document(text: str, name: str = "a", **metadata: Any) -> Document:
    return Document(text=text, id=name, metadata={"archive": "x", "offset": 0, "url": name, **metadata})


PAGES = [record(f"http://a.test/{i}", page(f"page {i} " * 50).encode()) for i in range(10)]


def test_archive_cut_in_half_is_noticed_and_what_is_whole_is_read(tmp_path):
    whole = archive(tmp_path / "a.warc.gz", PAGES).read_bytes()
    cut = tmp_path / "cut.warc.gz"
    cut.write_bytes(whole[: len(whole) // 2 + 7])
    documents, found = read(cut, tmp_path)
    assert len(documents) == 5
    assert [fault["fault"] for fault in found["faults"]] == ["the archive ends inside a record: it is cut short"]


def test_flipped_byte_in_the_middle_costs_one_record(tmp_path):
    path = archive(tmp_path / "a.warc.gz", PAGES)
    bytes_ = bytearray(path.read_bytes())
    start = sum(len(gzip.compress(one, mtime=0)) for one in PAGES[:4])
    bytes_[start + 60] ^= 0x10
    path.write_bytes(bytes_)
    documents, found = read(path, tmp_path)
    assert [d.metadata["url"][-1] for d in documents] == list("012356789")
    assert [fault["offset"] for fault in found["faults"]] == [start]


def test_undamaged_archive_has_no_faults(tmp_path):
    documents, found = read(archive(tmp_path / "a.warc.gz", PAGES), tmp_path, max_faults=0)
    assert (len(documents), found["faults"], found["records"]) == (10, [], {"response": 10})


def test_cut_archive_without_compression_is_noticed(tmp_path):
    path = tmp_path / "a.warc"
    path.write_bytes(b"".join(PAGES))
    assert len(read(path, tmp_path, max_faults=0)[0]) == 10
    path.write_bytes(b"".join(PAGES)[:-300])
    documents, found = read(path, tmp_path)
    assert len(documents) == 9
    assert "cut short" in found["faults"][0]["fault"]


@pytest.mark.parametrize("length", [10, 10_000])
def test_record_with_a_wrong_length_is_noticed_and_the_next_one_read(tmp_path, length):
    size = PAGES[3].split(b"Content-Length: ")[1].split(b"\r\n")[0]
    wrong = PAGES[3].replace(b"Content-Length: " + size, b"Content-Length: %d" % length)
    documents, found = read(archive(tmp_path / "a.warc.gz", [*PAGES[:3], wrong, *PAGES[4:]]), tmp_path)
    assert len(found["faults"]) == 1
    assert {d.metadata["url"][-1] for d in documents} >= set("012456789")


def test_more_faults_than_allowed_stop_the_archive(tmp_path):
    path = archive(tmp_path / "a.warc.gz", PAGES)
    path.write_bytes(path.read_bytes()[:-20])
    assert re.search(r"a\.warc\.gz has 1 damaged .* read\.max_faults = 0", read(path, tmp_path, max_faults=0)[1]["bad"])


def test_pages_that_are_none_are_dropped_with_the_reason(tmp_path):
    records = [
        record("http://a.test/missing", b"no", status="404 Not Found"),
        record("http://a.test/style", b"p {}", "Content-Type: text/css"),
        record("http://a.test/large", b"x" * 2000),
        record("http://a.test/blank", b""),
        record("http://a.test/good", page("Good. " * 40).encode()),
    ]
    documents, _ = read(archive(tmp_path / "a.warc.gz", records), tmp_path, max_page_bytes=1500)
    documents = list(ExtractText(ExtractConfig()).run(iter(documents)))
    reasons = [d.metadata.get("dropped") for d in documents]
    assert reasons == ["not_ok", "not_html", "too_large", "empty", None]


def test_chunked_and_gzip_bodies_are_unpacked(tmp_path):
    body = page("Packed. " * 40).encode()
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"
    records = [
        record("http://a.test/1", gzip.compress(body), "Content-Type: text/html\r\nContent-Encoding: gzip"),
        record("http://a.test/2", chunked, "Content-Type: text/html\r\nTransfer-Encoding: chunked"),
    ]
    documents, _ = read(archive(tmp_path / "a.warc.gz", records), tmp_path)
    assert [d.metadata["payload"] for d in documents] == [body, body]


def test_gzip_body_that_unpacks_to_a_gigabyte_is_dropped_unread(tmp_path):
    bomb = gzip.compress(bytes(1 << 26))
    records = [record("http://a.test/1", bomb, "Content-Type: text/html\r\nContent-Encoding: gzip")]
    documents, _ = read(archive(tmp_path / "a.warc.gz", records), tmp_path)
    assert [d.metadata["dropped"] for d in documents] == ["too_large"]
    assert len(documents[0].metadata["payload"]) <= (1 << 20) + 1


@pytest.mark.parametrize(
    ("name", "charset", "header", "meta"),
    [
        ("fra", "latin-1", "iso-8859-1", ""),
        ("fra", "latin-1", "", "iso-8859-1"),
        ("jpn", "shift_jis", "", "Shift_JIS"),
        ("jpn", "euc_jp", "euc-jp", ""),
        ("jpn", "iso2022_jp", "", "iso-2022-jp"),
        ("cmn_hans", "gb18030", "", "gb18030"),
        ("rus", "koi8_r", "", "koi8-r"),
        ("rus", "cp1251", "", ""),  # declared nowhere
        ("ell_monotonic", "utf-8", "iso-8859-1", "iso-8859-7"),  # declared wrongly, twice
    ],
)
def test_charset_of_a_page_is_found(name, charset, header, meta):
    text = declarations()[name][0][:1500].encode(charset, "ignore").decode(charset)
    html = page(text, f'<meta http-equiv="Content-Type" content="text/html; charset={meta}">' if meta else "")
    payload = html.encode(charset)
    found = find_charset(payload, header)
    assert payload.decode(found).split() == html.split()


def test_page_that_takes_too_long_or_too_much_is_dropped_and_the_next_one_read():
    bomb = b"<div>" * 60_000 + b"x" + b"</div>" * 60_000
    large = b"<p>hello world</p>\n" * 300_000
    step = ExtractText(ExtractConfig(timeout_seconds=2, memory_mib=64))
    pages = [bomb, large, page("Good. " * 40).encode()]
    documents = [document("", payload=payload, charset="") for payload in pages]
    reasons = [d.metadata.get("dropped") for d in step.run(iter(documents))]
    assert reasons == ["extract_timeout", "extract_crashed", None]


def test_normalised_text_has_no_control_characters_and_can_be_written():
    text = normalise("e\u0301 a\x00b\u00ad\ud800  c\t\td\n\n\n\n e ")
    assert text == "é ab c d\n\ne"
    text.encode("utf-8")


def test_identifiers_that_disagree_drop_the_page():
    sure, unsure = 1.0, 0.4
    assert decide(Vote("de", sure), Vote("de", sure), lambda _: (0.95, 0.9)) == ("de_DE", "")
    assert decide(Vote("zh", sure), Vote("zh-Hant", sure), lambda _: (0.95, 0.9)) == ("zh_TW", "")
    assert decide(Vote("nb", unsure), Vote("no", 0.5), lambda _: (0.95, 0.9)) == ("no_XX", "")
    assert decide(Vote("ms", sure), Vote("id", 0.99), lambda _: (0.95, 0.9)) == ("id_ID", "")
    assert decide(Vote("ku", sure), Vote("un", 0.0), lambda _: (0.95, 0.9)) == ("ku_TR", "")
    assert decide(Vote("ms", sure), Vote("id", 0.6), lambda _: (0.95, 0.9)) == (None, "language_uncertain")
    assert decide(Vote("et", sure), Vote("kl", 0.99), lambda _: (0.95, 0.9)) == (None, "language_unsupported")
    assert decide(Vote("un", 0.0), Vote("un", 0.0), lambda _: (0.95, 0.9)) == (None, "language_unsupported")


def test_page_in_two_languages_keeps_the_paragraphs_of_the_main_one():
    german, english = declarations()["deu_1996"][0], declarations()["eng"][0]
    step = IdentifyLanguage(IdentifyConfig())
    mixed = document(german[:6000] + "\n" + english[:2500])
    step.process(mixed)
    assert mixed.metadata["language"] == "de_DE"
    assert mixed.metadata["foreign_characters"] > 2000
    assert "Whereas recognition of the inherent dignity" not in mixed.text
    assert german[3000:3500] in mixed.text


def test_unwanted_language_is_dropped():
    unwanted = document(declarations()["fra"][0])
    IdentifyLanguage(IdentifyConfig(languages=["de_DE"])).process(unwanted)
    assert unwanted.metadata["dropped"] == "language_unwanted"


@pytest.mark.parametrize("name", ["eng", "jpn", "hin", "tha", "arb", "cmn_hans", "kor", "mya", "khm", "ell_monotonic"])
def test_filters_keep_a_declaration_in_any_script(name):
    text = declarations()[name][0]
    kept = document(text)
    FilterQuality(FilterConfig()).process(kept)
    assert not dropped(kept), kept.metadata
    assert letters(text) > 0.85


def test_filters_drop_what_is_not_text_with_the_reason():
    english = declarations()["eng"][0]
    cases = {
        "too_short": "Short.",
        "too_few_letters": "+-*/ 12 :: " * 100 + "(" * 500,
        "duplicate_lines": "\n".join([english[:300]] * 5),
        "short_lines": "\n".join(f"Menu {i}" for i in range(60)),
        "code": "\n".join(f"if (a[{i}] == b) {{ return call(x{i}, y, z); }} // some words" for i in range(20)),
    }
    for reason, text in cases.items():
        bad = document(text)
        FilterQuality(FilterConfig(max_duplicate_lines=0.3)).process(bad)
        assert bad.metadata.get("dropped") == reason


def deduplicated(documents: list[Document]) -> list[str | None]:
    """What becomes of each: None or the reason."""
    config = DeduplicateConfig()
    near = DropNearDuplicates(config)
    data = near.run(DropExactDuplicates().run(SignDocuments(config).run(iter(documents))))
    return [d.metadata.get("dropped") for d in data]


@pytest.mark.parametrize("name", ["eng", "jpn", "tha", "arb", "cmn_hans"])
def test_exact_and_near_duplicates_are_dropped_in_any_script(name):
    text, other = declarations()[name][0], declarations()["deu_1996" if name == "eng" else "eng"][0]
    other, middle = other[: len(text)], len(text) // 2
    near = text[:middle] + " 2026 " + text[middle + 40 :]
    far = text[: len(text) // 3] + other  # a third is the same
    documents = [document(t, str(i)) for i, t in enumerate([text, text + "\n", near, far, other])]
    assert deduplicated(documents) == [None, "exact_duplicate", "near_duplicate", None, None]


def test_translations_are_no_duplicates():
    texts = [text for text, label, _ in declarations().values() if label in ("es_XX", "gl_ES", "pt_XX", "it_IT")]
    names = [document(text, str(i)) for i, text in enumerate(texts)]
    kept = Counter(deduplicated(names))
    assert kept[None] >= 4


def test_held_out_documents_depend_on_their_ids_alone():
    names = [f"id{i}" for i in range(500)]

    def held(order: list[str]) -> set[str]:
        data = HoldOut(HeldoutConfig(fraction=0.05), 4).run(iter([document("t", name) for name in order]))
        return {d.id for d in data if d.metadata.get("heldout")}

    chosen = held(names)
    assert 10 <= len(chosen) <= 45
    assert held(names[::-1]) == chosen
    grown = held([*names, *(f"new{i}" for i in range(500))])
    assert {name for name in grown if name.startswith("id")} == chosen


@pytest.mark.parametrize(("documents", "held"), [(3, 0), (4, 1), (8, 2), (30, 2)])
def test_small_languages_hold_out_few_and_the_smallest_are_dropped(documents, held):
    step = HoldOut(HeldoutConfig(fraction=0.0, min_documents=2), 4)
    data = list(step.run(iter([document("t", f"id{i}") for i in range(documents)])))
    assert len(data) == documents
    kept = [d for d in data if not dropped(d)]
    assert len(kept) == (0 if documents < 4 else documents)
    assert sum("heldout" in d.metadata for d in kept) == held


def test_first_reason_stays_and_every_reason_is_explained():
    bad = document("x")
    drop(bad, "code")
    drop(bad, "too_short")
    assert bad.metadata["dropped"] == "code"
    with pytest.raises(AssertionError):
        drop(bad, "no_such_reason")
    assert all(meaning for reasons in REASONS.values() for meaning in reasons.values())
