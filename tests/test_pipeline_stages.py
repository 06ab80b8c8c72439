"""Stages of data_pipelines: whatever the parts, tasks and memory, they decide as the steps do on one stream."""

import json
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines import stages as staging
from data_pipelines.config import Recipe
from data_pipelines.config_load import load_recipe
from data_pipelines.steps import runs
from data_pipelines.steps.collect import CollectDocuments, collected_runs, document_of
from data_pipelines.steps.document import document_id, drop, dropped
from data_pipelines.steps.duplicates import DropExactDuplicates, DropNearDuplicates, SignDocuments
from data_pipelines.steps.holdout import HoldOut
from data_pipelines.steps.paragraphs import DropRepeatedParagraphs
from data_pipelines.steps.units import Unit, packed
from xlscale.data.shards import Corpus

STEPS = ["read", "identify", "exact", "near", "paragraphs", "hold_out", "write", "verify"]


def recipe(folder: Path, steps: Sequence[str] = STEPS, memory_mib: float = 1, part_mib: float = 1) -> Recipe:
    """A recipe for short documents and small parts."""
    path = folder / "recipe.toml"
    path.write_text(f'steps = {json.dumps(list(steps))}\n[run]\noutput = "out"\n[read]\narchives = ["a"]\n')
    found = load_recipe(path, ["filter.min_characters=10", "heldout.fraction=0.1"])
    run = replace(found.run, sort_memory_mib=memory_mib, task_mib=memory_mib)
    return replace(found, run=run, shards=replace(found.shards, part_mib=part_mib, documents_per_chunk=5))


def page(text: str, number: int, language: str = "de_DE") -> Document:
    """A document as it comes to CollectDocuments."""
    metadata = {"url": f"http://a.test/{number}", "archive": "a", "offset": number, "language": language}
    return Document(text, document_id(metadata["url"], text.encode()), metadata=metadata)


def texts(seed: int, count: int) -> list[str]:
    """Texts of a few lines, of which some come again, some nearly, and whose lines come again."""
    rng = np.random.default_rng(seed)
    words = ["".join(letters) for letters in rng.choice([*"abcdefghijklmnoprstuvwz"], (500, 6))]
    lines = [" ".join(rng.choice(words, 12)) for _ in range(max(1, count))]
    made: list[str] = []
    for _ in range(count):
        if made and rng.random() < 0.2:
            text = made[rng.integers(len(made))] + str(rng.choice(["", " ", " and more"]))
        else:
            text = "\n".join(lines[n] for n in rng.integers(0, len(lines), rng.integers(1, 6)))
        made.append(text)
    return made


def collect(made: Recipe, work: Path, tasks: Sequence[Sequence[Document]]) -> None:
    """What the read stage leaves behind."""
    asked = staging.cut(made.steps).corpus
    for rank, documents in enumerate(tasks):
        step = CollectDocuments(work / "documents", work / "archives", asked, made.deduplicate, made.report,
                                made.run.sort_memory_mib)  # fmt: skip
        list(step.run(SignDocuments(made.deduplicate).run(iter(documents)), rank))


def run_stages(made: Recipe, work: Path, until: str = "") -> dict[str, int]:
    """Runs the stages after reading, up to one; the number of tasks of each."""
    (work / "a.jsonl").touch()
    found = staging.stages(made, [str(work / "a.jsonl")], work)
    next(found)
    tasks = {}
    for stage in found:
        if stage.name == until:
            break
        tasks[stage.name] = len(stage.sizes)
        for rank in range(len(stage.sizes)):
            data: Any = None
            for step in stage.steps:
                data = step.run(data, rank, len(stage.sizes))
            list(data)
    return tasks


def decided(made: Recipe, work: Path) -> list[tuple[Any, ...]]:
    """All documents as they come to WriteShards."""
    run_stages(made, work, "write")
    stage = next(stage for stage in staging.stages(made, [str(work / "a.jsonl")], work) if stage.name == "write")
    return [facts(document) for rank in range(len(stage.sizes)) for document in stage.steps[0].run(None, rank)]


def facts(document: Document) -> tuple[Any, ...]:
    """All that was decided of a document."""
    keys = ("dropped", "duplicate_of", "similarity", "cluster_size", "heldout", "repeated_characters")
    return document.id, document.text, *(document.metadata.get(key) for key in keys)


def on_one_stream(made: Recipe, documents: Sequence[Document]) -> list[tuple[Any, ...]]:
    """What the steps alone make of all documents of one language."""
    data: Iterator[Document] = iter(sorted(documents, key=lambda document: document.id))
    for step in (SignDocuments(made.deduplicate), DropExactDuplicates(), DropNearDuplicates(made.deduplicate),
                 DropRepeatedParagraphs(made.filter.min_characters),
                 HoldOut(made.heldout, made.shards.min_documents)):  # fmt: skip
        data = step.run(data)
    return [facts(document) for document in data]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 5), st.sampled_from([1e-4, 1e-3, 1]),
       st.sampled_from([1e-3, 3e-3, 1]))  # fmt: skip
def test_stages_decide_as_the_steps_on_one_stream(tmp_path_factory, seed, count, tasks, memory, part):
    folder = tmp_path_factory.mktemp("stages")
    made = recipe(folder, memory_mib=memory, part_mib=part)
    collect(made, folder, [pages[rank::tasks] for pages in [numbered(seed, count)] for rank in range(tasks)])
    assert decided(made, folder) == on_one_stream(made, numbered(seed, count))


def numbered(seed: int, count: int) -> list[Document]:
    return [page(text, number) for number, text in enumerate(texts(seed, count))]


def published(made: Recipe, work: Path) -> dict[str, Any]:
    """All stages and what they leave."""
    tasks = run_stages(made, work)
    staging.assemble(made, work)
    corpus = Corpus.open(work / "shards")
    return {
        "documents": {code: list(corpus.read(code)) for code in corpus.languages},
        "heldout": {path.name: path.read_text() for path in (work / "heldout").iterdir()},
        "tasks": tasks,
        "shards": [record.shard for code in corpus.languages for record in corpus.records(code)],
        "fingerprint": corpus.fingerprint,
    }


def test_a_language_in_one_part_is_the_same_as_in_five(tmp_path):
    results = []
    for name, part, memory in (("one", 1, 1), ("five", 0.02, 0.01)):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, memory_mib=memory, part_mib=part)
        both = [*numbered(1, 300), *(page(text, i, "fr_XX") for i, text in enumerate(texts(2, 20)))]
        collect(made, tmp_path / name, [both[:100], both[100:]])
        results.append(published(made, tmp_path / name))
    one, five = results
    parts = [len(list((tmp_path / name / "written/de_DE").glob("[0-9]*"))) for name in ("one", "five")]
    assert parts[0] == 1
    assert parts[1] >= 5
    assert five["documents"] == one["documents"]
    assert len(one["documents"]["de_DE"]) > 50
    assert five["heldout"] == one["heldout"]
    assert five["shards"] == sorted(set(five["shards"]))
    assert five["fingerprint"] != one["fingerprint"]  # parts cut shards elsewhere
    assert one["tasks"] == dict.fromkeys(("gather", "join", "decide", "write", "verify"), 1)
    assert min(five["tasks"].values()) > 1


def test_parts_without_a_document_are_no_harm(tmp_path):
    results = []
    for name, part in (("one", 1), ("many", 0.0003)):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, part_mib=part)
        collect(made, tmp_path / name, [numbered(9, 30)])
        results.append(published(made, tmp_path / name))
    parts = list((tmp_path / "many/gathered/de_DE").glob("[0-9]*"))
    assert sum((part / "ids").stat().st_size == 0 for part in parts) > 2
    assert results[0]["documents"] == results[1]["documents"]
    assert results[0]["heldout"] == results[1]["heldout"]


def test_steps_that_a_recipe_leaves_out_are_not_done(tmp_path):
    documents = [page("the same text of some length", i) for i in range(6)]
    for left_out in ("exact", "near", "paragraphs", "hold_out"):
        folder = tmp_path / left_out
        folder.mkdir()
        made = recipe(folder, [step for step in STEPS if step != left_out])
        collect(made, folder, [[page(document.text, i) for i, document in enumerate(documents)]])
        reasons = {row[2] for row in decided(made, folder)}
        expected = {"exact": {"near_duplicate"}, "near": {"exact_duplicate"}, "paragraphs": {"exact_duplicate"},
                    "hold_out": {"exact_duplicate", None}}[left_out]  # fmt: skip
        assert expected <= reasons
        assert ("small_language" in reasons) == (left_out != "hold_out")
    folder = tmp_path / "none"
    folder.mkdir()
    made = recipe(folder, ["read", "identify", "write", "verify"])
    collect(made, folder, [documents])
    assert len(published(made, folder)["documents"]["de_DE"]) == 6


def test_held_out_lines_that_stand_in_training_of_any_part_are_taken_out(tmp_path):
    made = recipe(tmp_path, [step for step in STEPS if step != "paragraphs"], part_mib=0.005)
    made = replace(made, heldout=replace(made.heldout, fraction=0.3), filter=replace(made.filter, min_characters=50))
    shared = "this line stands on every page of the site and is long enough to be known again"
    pages = [page(f"{text}\n{shared}\n{text[::-1]}", i) for i, text in enumerate(texts(5, 60))]
    collect(made, tmp_path, [pages])
    result = published(made, tmp_path)
    assert len(list((tmp_path / "written/de_DE").glob("[0-9]*"))) > 2
    rows = [json.loads(line) for line in result["heldout"]["de_DE.jsonl"].splitlines()]
    assert rows
    assert not [row for row in rows if shared in row["text"]]
    assert all(shared in row["text"] for row in result["documents"]["de_DE"])


def test_shards_that_do_not_read_back_are_noticed(tmp_path):
    made = recipe(tmp_path)
    collect(made, tmp_path, [numbered(3, 40)])
    run_stages(made, tmp_path, "verify")
    (shard,) = (tmp_path / "written/de_DE/00000/de_DE").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="crc32c"):
        run_stages(made, tmp_path)
    content[700] ^= 1
    shard.write_bytes(content)
    tally = tmp_path / "written/de_DE/00000/tally.json"
    tally.write_text(tally.read_text().replace('"ids": "', '"ids": "0'))
    with pytest.raises(OSError, match="do not read back as they were written"):
        run_stages(made, tmp_path)


def test_unit_killed_in_the_middle_is_made_anew_and_a_finished_one_is_not(tmp_path):
    made = recipe(tmp_path, part_mib=0.005)
    collect(made, tmp_path, [numbered(4, 80)])
    expected = published(made, tmp_path)
    part = tmp_path / "written/de_DE/00001"
    part.rename(part.with_name(".00001"))
    (part.with_name(".00001") / "rest").touch()
    kept = (tmp_path / "written/de_DE/00000/tally.json").stat().st_ino
    assert published(made, tmp_path) == expected
    assert not (part / "rest").exists()
    assert (tmp_path / "written/de_DE/00000/tally.json").stat().st_ino == kept


def test_collecting_takes_no_more_memory_than_allowed_and_loses_nothing(tmp_path):
    made = recipe(tmp_path)

    def pages() -> Iterator[Document]:
        for i in range(2000):
            yield page(f"{i} " + "text of a page " * 500, i, ("de_DE", "fr_XX")[i % 2])

    step = CollectDocuments(tmp_path / "documents", tmp_path, ["exact"], made.deduplicate, made.report, 1)
    tracemalloc.start()
    list(step.run(pages()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20 < 2000 * 7500
    for language in ("de_DE", "fr_XX"):
        (run,) = collected_runs(tmp_path / "documents", language)
        found = [document_of(row.line) for row in runs.read_run(run, step.facts)]
        assert [document.id for document in found] == sorted(
            document.id for document in pages() if document.metadata["language"] == language
        )
    assert not (tmp_path / "documents/00000/runs").exists()


def test_gathering_joining_and_deciding_take_less_memory_than_signatures(tmp_path):
    made = recipe(tmp_path, [step for step in STEPS if step != "paragraphs"], part_mib=0.1)
    total, rng = 12_000, np.random.default_rng(0)
    signatures = rng.integers(0, 2**32, (total, 112), dtype=np.uint32)  # 5.4 MB
    signatures[1::3] = signatures[::3]
    ids = sorted(rng.bytes(16) for _ in range(total))
    for task in range(2):
        run = tmp_path / f"documents/{task:05d}/de_DE"
        runs.write_run(run, (runs.Row(ids[i], 0, b"{}\n", ids[i], signatures[i].tobytes(), b"")
                             for i in range(task, total, 2)))  # fmt: skip
    peaks = {}
    (tmp_path / "a.jsonl").touch()
    found = staging.stages(made, [str(tmp_path / "a.jsonl")], tmp_path)
    next(found)
    for name in ("gather", "join", "decide"):
        stage = next(found)
        assert stage.name == name
        tracemalloc.start()  # what is mapped from files does not count
        for rank in range(len(stage.sizes)):
            list(stage.steps[0].run(None, rank))
        peaks[name] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    verdicts = np.fromfile(tmp_path / "decided/de_DE/verdict", np.uint8)
    assert np.bincount(verdicts)[3] == total // 3
    assert max(peaks.values()) < 4 << 20 < signatures.nbytes, peaks


def test_many_runs_are_merged_with_few_files_open_and_the_first_of_a_page_stays_first(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "MOST_FILES", 3)
    made = recipe(tmp_path)
    same = [page("the same page", 7) for _ in range(30)]
    for i, document in enumerate(same):
        document.metadata["archive"] = f"a{i:02d}"
    collect(made, tmp_path, [[one, *numbered(i, 3)] for i, one in enumerate(same)])
    run_stages(made, tmp_path, "join")
    rows = [json.loads(line) for line in (tmp_path / "gathered/de_DE/00000/documents.jsonl").open()]
    assert len(rows) == 120
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    archives = [row["metadata"]["archive"] for row in rows if row["id"] == same[0].id]
    assert archives == [f"a{i:02d}" for i in range(30)]
    assert not list((tmp_path / "gathered/de_DE/00000").glob("merged*"))


def test_dropped_documents_are_put_aside_whole_when_asked(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    made = recipe(tmp_path)
    made = replace(made, report=replace(made.report, all_dropped=True))
    documents = numbered(6, 80)
    for document in documents[::10]:
        drop(document, "code")
        document.metadata["payload"] = b"\xff"
    collect(made, tmp_path, [documents[:40], documents[40:]])
    expected = on_one_stream(made, [d for d in numbered(6, 80) if d.id not in {x.id for x in documents[::10]}])
    result = published(made, tmp_path)
    found = {}
    for path in (tmp_path / "dropped").glob("*/*.jsonl.zst"):
        lines = zstandard.ZstdDecompressor().stream_reader(path.open("rb")).read().splitlines()
        found |= {row["id"]: (path.parent.name, row["text"]) for row in map(json.loads, lines)}
    gone = {row[0]: (row[2], row[1]) for row in expected if row[2]}
    gone |= {document.id: ("code", document.text) for document in documents if dropped(document)}
    seen = {name: row for name, row in found.items() if row[0] == "seen_in_training"}
    assert found == gone | seen
    assert len({reason for reason, _ in gone.values()}) >= 4
    assert len(found) + len(result["documents"]["de_DE"]) + len(result["heldout"]["de_DE.jsonl"].splitlines()) == 80


def test_units_are_packed_in_their_order():
    units = [Unit("a", str(i), size << 20) for i, size in enumerate([1, 1, 5, 0, 1, 3])]
    assert [[unit.name for unit in task] for task in packed(units, 2 << 20)] == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert packed([], 2) == []
