"""data_pipelines: corpora that are text already come in as archives do."""

import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest
import zstandard

from data_pipelines import archives
from data_pipelines.__main__ import main
from data_pipelines.config import ExtractConfig, IdentifyConfig, ReadConfig, RecipeError
from data_pipelines.steps.corpora import kind_of, language_of_path
from data_pipelines.steps.extract import ExtractText
from data_pipelines.steps.identify import IdentifyLanguage
from data_pipelines.steps.read import ReadArchives, field
from tests.test_pipeline import recipe
from tests.test_pipeline_steps import declarations, document
from xlscale.data.shards import Corpus

PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".xz": lzma.compress,
}


def read(path: Path, tmp_path: Path, **settings: Any) -> tuple[list[Any], Any]:
    """The documents of a corpus after the extraction, and what was reported of it."""
    step = ReadArchives([str(path)], ReadConfig(archives=[], **settings), tmp_path / "found", tmp_path / "progress")
    documents = list(ExtractText(ExtractConfig()).run(step.run()))
    return documents, json.loads((tmp_path / "found/00000.jsonl").read_text())


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_corpus_is_read_whatever_it_is_compressed_with(kind, packed, tmp_path):
    texts = [declarations()[name][0] for name in ("deu_1996", "jpn", "arb")] * 20
    texts = ["\n".join(line for line in text.split("\n") if line) for text in texts]
    content = lines([{"text": text} for text in texts]) if kind == "jsonl" else "\n\n".join(texts).encode()
    path = tmp_path / f"corpus.{kind}{packed}"
    path.write_bytes(PACKERS[packed](content))
    documents, found = read(path, tmp_path, max_faults=0)
    assert [d.text for d in documents] == texts
    assert [d.metadata["offset"] for d in documents] == list(range(60))
    assert found["records"] == {kind: 60}


@pytest.mark.parametrize("packed", [".gz", ".zst", ".xz"])
def test_cut_corpus_is_noticed_and_what_came_before_is_read(packed, tmp_path):
    rows = [{"text": f"{i} {hash(('salt', i))} " * 50} for i in range(2000)]
    path = tmp_path / f"a.jsonl{packed}"
    path.write_bytes(PACKERS[packed](lines(rows)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 3 // 4])
    documents, found = read(path, tmp_path)
    assert 0 < len(documents) < 2000
    assert "cut short; what follows is lost" in found["faults"][-1]["fault"]
    assert "read.max_faults = 0" in read(path, tmp_path, max_faults=0)[1]["bad"]


def test_members_one_after_another_are_one_file(tmp_path):
    for packed in (".gz", ".zst", ".xz"):
        path = tmp_path / f"a.jsonl{packed}"
        path.write_bytes(b"".join(PACKERS[packed](lines([{"text": f"text {i}"}])) for i in range(5)))
        assert [d.text for d in read(path, tmp_path)[0]] == [f"text {i}" for i in range(5)]


def test_lines_that_are_no_documents_are_counted_as_damage(tmp_path):
    path = tmp_path / "a.jsonl"
    good = lines([{"text": "good"}])
    path.write_bytes(good + b"{broken\n" + good + b"[1]\n\n" + good + b'{"content": "x"}\n' + b'{"text": "cut of')
    documents, found = read(path, tmp_path, max_faults=4)
    assert [d.text for d in documents] == ["good"] * 3
    faults = [fault["fault"] for fault in found["faults"]]
    for fault, part in zip(faults, ("line 2 is no JSON", "line 4 is no JSON object", "it has content: set read.text_",
                                    "line 8 is no JSON"), strict=True):  # fmt: skip
        assert part in fault
    assert not found["bad"]
    assert read(path, tmp_path, max_faults=3)[1]["bad"]


@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_document_that_is_too_long_is_dropped_and_the_next_one_read(kind, tmp_path):
    texts = ["x" * 1500, "short", "long " * 100_000, "a line\n" * 2000, "last"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes(lines([{"text": t} for t in texts]) if kind == "jsonl" else "\n\n".join(texts).encode())
    documents, found = read(path, tmp_path, max_page_bytes=1024, max_faults=0)
    assert [d.metadata.get("dropped") for d in documents] == ["too_large", None, "too_large", "too_large", None]
    assert [d.text for d in documents if d.text] == ["short", "last"]
    assert found["faults"] == []


def test_fields_are_found_by_name_and_by_path(tmp_path):
    row = {"content": "text", "warc_headers": {"warc-target-uri": "http://a.test/ b"},
           "metadata": {"identification": {"label": "fr"}}}  # fmt: skip
    path = tmp_path / "oscar.jsonl"
    path.write_bytes(lines([row]))
    names = {"text_field": "content", "url_field": "warc_headers.warc-target-uri"}
    (document,), _ = read(
        path, tmp_path, **names, language_from="field", language_field="metadata.identification.label"
    )
    assert (document.text, document.metadata["url"]) == ("text", "http://a.test/%20b")
    assert document.metadata["language"] == "fr_XX"
    assert field({"a.b": 1, "a": {"b": 2}}, "a.b") == 1
    assert field({"a": 3}, "a.b") is None


def test_language_of_a_field_is_ours_or_drops_the_document(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        lines([{"text": "x", "language": code} for code in ("deu_Latn", "zh-Hant", "tlh", "")] + [{"text": "x"}])
    )
    documents, _ = read(path, tmp_path, language_from="field")
    assert [d.metadata.get("language") for d in documents] == ["de_DE", "zh_TW", None, None, None]
    assert [d.metadata.get("dropped") for d in documents] == [None, None, *["language_unsupported"] * 3]


def test_language_that_an_archive_says_is_not_identified_again():
    said = document(declarations()["fra"][0], language="de_DE")
    IdentifyLanguage(IdentifyConfig()).process(said)
    assert said.metadata["language"] == "de_DE"
    IdentifyLanguage(IdentifyConfig(languages=["fr_XX"])).process(said)
    assert said.metadata["dropped"] == "language_unwanted"


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("cc100/de.txt.xz", "de_DE"),
        ("zh-Hans.txt.xz", "zh_CN"),
        ("zh-Hant.txt.xz", "zh_TW"),
        ("ta_rom.txt.xz", "ta_Latn"),
        ("my_zaw.txt.xz", "my_Qaag"),
        ("oscar/fr_meta_part_1.jsonl.gz", "fr_XX"),
        ("fineweb-2/data/deu_Latn/train/000_00000.parquet", "de_DE"),
        ("https://a.test/data/srp_Cyrl/train/000_00000.parquet", "sr_RS"),
        ("en/corpus/2024/a.jsonl", None),  # three above
        ("corpus.jsonl", None),
    ],
)
def test_language_is_told_by_names_as_published_corpora_have_them(path, language):
    assert language_of_path(path) == language


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.warc", "warc"), ("A.WARC.GZ", "warc"), ("a.warc.wet.gz", "warc"), ("a.jsonl.zst", "jsonl"),
     ("a.json", "jsonl"), ("de.txt.xz", "txt"), ("000.parquet", "parquet"), ("a.warc.lz4", "warc")],
)  # fmt: skip
def test_name_says_how_a_file_is_read(name, kind):
    assert kind_of(name, ReadConfig(archives=[])) == kind
    assert kind_of(name, ReadConfig(archives=[], format="txt")) == "txt"


def test_parquet_rows_are_documents(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"text {i}", "url": f"http://a.test/{i}", "language": "deu", "score": 0.5} for i in range(1000)]
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    documents, found = read(path, tmp_path, language_from="field", max_faults=0)
    assert [(d.text, d.metadata["url"], d.metadata["language"]) for d in documents] == [
        (row["text"], row["url"], "de_DE") for row in rows
    ]
    assert found["records"] == {"parquet": 1000}
    assert (
        "there are text, url, language, score: set"
        in read(path, tmp_path, text_field="content")[1]["faults"][0]["fault"]
    )
    path.write_bytes(path.read_bytes()[:-100])
    documents, found = read(path, tmp_path)
    assert documents == []
    assert "what follows is lost" in found["faults"][0]["fault"]


def test_recipe_makes_shards_of_corpora_with_the_languages_of_their_files(tmp_path):
    for folder, name in (("deu_Latn", "deu_1996"), ("rus_Cyrl", "rus")):
        text = [line for line in declarations()[name][0].split("\n") if line]
        rows = [{"text": "\n".join(text[i : i + 6]), "url": f"http://{name}/{i}"} for i in range(0, len(text) - 6, 6)]
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "000.jsonl.gz").write_bytes(gzip.compress(lines(rows), mtime=0))
    config = recipe(tmp_path, f"{tmp_path}/*/000.jsonl.gz", more="language_from = 'path'\n")
    assert main([str(config)]) == 0
    corpus = Corpus.open(tmp_path / "out/shards")
    assert corpus.languages == ["de_DE", "ru_RU"]
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["total"]["read"] == sum(row["records"]["jsonl"] for row in report["archives"])
    assert next(corpus.read("de_DE"))["url"].startswith("http://deu_1996/")


def test_packages_that_are_missing_are_named_before_anything_runs(tmp_path, monkeypatch):
    for name in ("a.parquet", "b.parquet", "a.jsonl.lz4"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setattr(archives, "find_spec", lambda package: None)
    with pytest.raises(RecipeError) as caught:
        archives.find_archives(ReadConfig(archives=[f"{tmp_path}/*"]))
    assert caught.value.problems == [
        "read.archives: lz4 files need the package lz4: pip install 'xlscale[lz4]'",
        "read.archives: parquet files need the package pyarrow: pip install 'xlscale[parquet]'",
    ]


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("a.pdf", "", "a.pdf: its name does not end in .warc, .wet, .jsonl"),
        ("a.jsonl", "language_from = 'path'\n", "name it like de.jsonl.gz or deu_Latn/"),
        ("a.warc.gz", "language_from = 'field'\n", "is warc and has no fields; use 'text' or 'path'"),
        ("a.jsonl", "format = 'json'\n", "read.format = 'json' must be one of auto, warc, index, jsonl, parquet, txt"),
    ],
)
def test_what_a_recipe_cannot_read_is_said_before_it_starts(name, more, expected, tmp_path, capsys):
    (tmp_path / name).write_bytes(b"x")
    assert main([str(recipe(tmp_path, f"{tmp_path}/{name}", more=more))]) == 2
    assert expected in capsys.readouterr().err
