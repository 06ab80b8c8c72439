"""One step alone on a jsonl file, as a person runs it."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from data_pipelines.__main__ import main
from tests.test_pipeline import recipe
from tests.test_pipeline_steps import declarations, page


@pytest.fixture
def config(tmp_path):
    """A recipe; its archives are not looked at."""
    return str(recipe(tmp_path, "none.warc.gz"))


def lines(path: Path) -> list[dict]:
    """The documents of a jsonl file."""
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    if path.suffix == ".zst":
        content = zstandard.ZstdDecompressor().stream_reader(content).read()
    return [json.loads(line) for line in content.splitlines()]


def write(path: Path, rows: list[dict]) -> str:
    """A jsonl file, packed as its name says."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        content = gzip.compress(content)
    if path.suffix == ".zst":
        content = zstandard.compress(content)
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
def test_near_duplicates_of_a_file_are_found(packed, config, tmp_path, capsys):
    text = declarations()["eng"][0]
    rows = [{"id": "a", "text": text, "url": "http://a"}, {"id": "b", "text": text + " More."}, {"text": text[:900]}]
    source, kept, refused = (tmp_path / f"{name}.jsonl{packed}" for name in ("source", "kept", "refused"))
    write(source, rows)
    arguments = ["--input", str(source), "--output", str(kept), "--dropped", str(refused)]
    assert main(["step", "near", config, *arguments]) == 0
    assert "near: 3 documents, 2 kept, dropped: near_duplicate 1" in capsys.readouterr().out
    first, third = lines(kept)
    assert first == {**rows[0], "cluster_size": 2}
    assert len(third["id"]) == 32
    (dropped,) = lines(refused)
    assert (dropped["id"], dropped["dropped"], dropped["duplicate_of"]) == ("b", "near_duplicate", "a")


def test_steps_that_work_on_pages_work_alone_one_after_the_other(config, tmp_path, capsys):
    german, english = declarations()["deu_1996"][0][:3000], declarations()["eng"][0][:3000]
    source = write(tmp_path / "0.jsonl", [{"html": page(text)} for text in (german, english + " a@b.org", "x")])
    for place, name in enumerate(("extract", "clean", "identify", "filter", "mask", "exact", "paragraphs", "hold_out")):
        target = str(tmp_path / f"{place + 1}.jsonl")
        assert main(["step", name, config, "--input", source, "--output", target]) == 0, capsys.readouterr().err
        source = target
        kept = lines(Path(target))
        assert len(kept) == (3 if name in ("extract", "clean") else 0 if name == "hold_out" else 2)
        if name == "mask":
            assert [row["language"] for row in kept] == ["de_DE", "en_XX"]
            assert "email@example.com" in kept[1]["text"]
            assert "payload" not in kept[0]
    assert "small_language 2" in capsys.readouterr().out


def test_own_step_works_alone(config, tmp_path):
    (tmp_path / "own.py").write_text(
        "from data_pipelines.steps.document import DocumentStep, drop\n"
        "class Short(DocumentStep):\n"
        "    reasons = {'long': 'more than three letters'}\n"
        "    def process(self, document):\n"
        "        if len(document.text) > 3:\n"
        "            drop(document, 'long')\n"
    )
    source = write(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "abcd", "dropped": "code"}])
    kept, refused = tmp_path / "kept.jsonl", tmp_path / "refused.jsonl"
    arguments = ["--input", source, "--output", str(kept), "--dropped", str(refused)]
    assert main(["step", f"{tmp_path}/own.py:Short", config, *arguments]) == 0
    assert [row["text"] for row in lines(kept)] == ["abc"]
    assert [row["dropped"] for row in lines(refused)] == ["long"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("quality", '{"text": "no language"}', "has no 'language', which quality needs; run the step that sets it"),
        ("clean", '{"text": "a"}\n["b"]', "line 2 is no document"),
        ("clean", '{"text": 3}', "line 1 is no document (text is no string); a line is an object with `text`"),
        ("verify", "", "step 'verify' is none that works alone; there are refuse, extract"),
        ("clean", None, "is no file (from "),
        ("clean", "cut", "cannot be unpacked (Compressed file ended"),
    ],
)
def test_what_a_step_cannot_read_is_one_line_and_nothing_is_written(name, content, expected, config, tmp_path, capsys):
    source, kept = tmp_path / "a.jsonl", tmp_path / "kept.jsonl"
    if content is not None:
        source.write_text(content)
    if content == "cut":
        source = source.with_name("a.jsonl.gz")
        source.write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    more = ["--set", "filter.rules=['gopher']"]
    assert main(["step", name, config, "--input", str(source), "--output", str(kept), *more]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert expected in error
    assert not [path for path in tmp_path.iterdir() if "kept" in path.name]
