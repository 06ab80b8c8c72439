"""Archives of data_pipelines dealt out to tasks: bad ones are left out, and how many a task has changes nothing."""

import json
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from tests.test_pipeline import same
from tests.test_pipeline_stages import texts
from xlscale.data.shards import Corpus

STEPS = ["read", "identify", "exact", "near", "paragraphs", "hold_out", "write", "verify"]


@pytest.fixture
def corpora(tmp_path: Path) -> Path:
    """Five files of documents, of which some stand in two, the last of them with two broken lines at its end."""
    made = texts(8, 200)
    for number in range(5):
        some = made[number * 40 : number * 40 + 45]
        rows = [{"text": text, "url": f"http://a.test/{len(text)}", "language": "de"} for text in some]
        lines = [json.dumps(row) for row in rows] + ["{broken"] * 2 * (number == 4)
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.toml").write_text(
        f'steps = {json.dumps(STEPS)}\n[run]\noutput = "{tmp_path}/out"\n[filter]\nmin_characters = 10\n'
        f'[read]\narchives = ["{tmp_path}/*.jsonl"]\nlanguage_from = "field"\n[report]\nall_dropped = true\n'
    )
    return tmp_path


def run(folder: Path, output: str, *settings: str) -> int:
    """The command."""
    given = [f"run.output={folder}/{output}", *settings]
    return main([str(folder / "recipe.toml"), *(part for one in given for part in ("--set", one))])


def documents(folder: Path) -> list[dict]:
    corpus = Corpus.open(folder / "shards")
    return [document for code in corpus.languages for document in corpus.read(code)]


def test_bad_archive_is_left_out_and_named_and_the_others_go_on(corpora):
    assert run(corpora, "bad", "read.max_faults=1") == 0
    report = json.loads((corpora / "bad/report.json").read_text())
    assert report["dropped"]["bad_archive"] == 40
    assert [bool(row["bad"]) for row in report["archives"]] == [False] * 4 + [True]
    assert "4.jsonl has 2 damaged places, over read.max_faults = 1" in report["archives"][4]["bad"]
    assert report["total"]["read"] == 220
    (corpora / "4.jsonl").unlink()
    assert run(corpora, "without", "read.max_faults=1") == 0
    assert documents(corpora / "bad") == documents(corpora / "without")
    assert len(documents(corpora / "bad")) > 20


def test_more_bad_archives_than_allowed_stop_the_run_with_their_names(corpora, capsys):
    for number in (1, 2):
        with (corpora / f"{number}.jsonl").open("a") as file:
            file.write("{broken\n" * 2)
    assert run(corpora, "out", "read.max_faults=1", "read.max_bad_archives=0.4") == 2
    error = capsys.readouterr().err
    assert all(f"{number}.jsonl has 2 damaged places" in error for number in (1, 2, 4))
    assert "3 of 5 archives are bad, read.max_bad_archives = 0.4 allows 2; mend them, or raise it" in error
    assert not (corpora / "out/shards").exists()
    assert run(corpora, "out", "read.max_faults=1", "read.max_bad_archives=0.6") == 0  # goes on where it stopped
    assert "goes on" not in capsys.readouterr().err


def test_result_is_the_same_however_many_archives_a_task_has(corpora):
    for output, settings in {
        "one": (),
        "two": ("read.archives_per_task=2", "run.workers=2", "run.task_mib=1", "run.sort_memory_mib=1"),
        "all": ("read.archives_per_task=100",),
    }.items():
        assert run(corpora, output, *settings) == 0
    assert same(corpora / "one", corpora / "two")
    assert same(corpora / "one", corpora / "all")
