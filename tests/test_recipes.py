"""The recipes of configs/: each loads, says what it is for, and runs on a small corpus."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from data_pipelines.__main__ import main
from data_pipelines.chain import cut
from data_pipelines.config_load import load_recipe
from tests.test_pipeline_steps import SAMPLE, declarations
from xlscale.data.shards import Corpus

RECIPES = sorted((Path(__file__).parents[1] / "configs").glob("data_*.toml"))
CONFIGS = RECIPES[0].parent


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_says_what_it_costs_and_how_it_is_run(path):
    header = path.read_text("utf-8").split("\n\n")[0]
    assert all(line.startswith("# ") for line in header.splitlines())
    assert "Hardware:" in header
    assert "Cost:" in header
    assert f"python -m data_pipelines configs/{path.name}" in header
    recipe = load_recipe(path)
    assert f'"{recipe.steps[0]}", ' in path.read_text("utf-8")  # the list stands there, it is not a default
    assert cut(recipe.steps).corpus


def local(name: str, archives: list[str], tmp_path: Path, *more: str) -> dict:
    """The report of a recipe, run on this machine."""
    settings = [f"read.archives={archives}", f"run.output={tmp_path}/out", "run.executor=local", "run.workers=1"]
    settings += ["shards.min_documents=2", *more]
    assert main([str(CONFIGS / name), *(word for setting in settings for word in ("--set", setting))]) == 0
    return json.loads((tmp_path / "out/report.json").read_text())


def test_snapshot_recipe_reads_a_listing_and_its_rules_hold(tmp_path):
    whole = (SAMPLE / "handbook-a.warc.gz").read_bytes()
    (tmp_path / "part.warc.gz").write_bytes(whole[: len(whole) // 12])  # its last record is damaged: one fault
    (tmp_path / "warc.paths").write_text("part.warc.gz\n")
    report = local("data_commoncrawl.toml", [f"{tmp_path}/warc.paths"], tmp_path, f"read.listing_base={tmp_path}")
    assert report["total"]["read"] > 15
    assert len(report["archives"][0]["faults"]) == 1
    assert {reason.split("_")[0] for reason in report["dropped"]} >= {"gopher", "fineweb"}
    corpus = Corpus.open(tmp_path / "out/shards")
    assert {record.format for code in corpus.languages for record in corpus.records(code)} == {"jsonl.zst"}
    assert "en_XX" in corpus.languages


def test_wet_recipe_takes_out_what_stands_in_other_pages(tmp_path):
    texts = [text for text, _, _ in (declarations()[name] for name in ("deu_1996", "fra", "rus"))]
    footer = "Alle Rechte an dieser Sammlung von Texten liegen bei den Vereinten Nationen und bei niemandem sonst."
    records = []
    for text in texts:
        lines = [line for line in text.split("\n") if len(line) > 60]
        for start in range(0, len(lines) - 8, 8):
            body = "\n".join([*lines[start : start + 8], footer]).encode()
            head = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: http://a.test/{len(records)}\r\n"
            records.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body + b"\r\n\r\n")
    (tmp_path / "a.warc.wet").write_bytes(b"".join(records))
    report = local("data_wet_cc100.toml", [f"{tmp_path}/a.warc.wet"], tmp_path)
    assert report["total"]["read"] == len(records) > 10
    assert report["total"]["training"] + report["total"]["heldout"] == len(records)
    corpus = Corpus.open(tmp_path / "out/shards")
    assert corpus.languages == ["de_DE", "fr_XX", "ru_RU"]
    german = [document["text"] for document in corpus.read("de_DE")]
    assert sum(footer in text for text in german) <= 1


def test_import_recipe_believes_the_corpus_and_finds_duplicates_between_its_files(tmp_path):
    lines = [line for line in declarations()["deu_1996"][0].split("\n") if len(line) > 60]
    texts = ["\n".join(lines[start : start + 6]) for start in range(0, len(lines) - 6, 6)]
    rows = [{"text": text, "url": f"http://a.test/{place}", "language": "deu"} for place, text in enumerate(texts)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = [row | {"url": "http://b.test/", "language": "cat"} for row in rows[:3]] + rows[:2]
    pyarrow.parquet.write_table(pa.Table.from_pylist(other), tmp_path / "two.parquet")
    report = local("data_import_jsonl.toml", [f"{tmp_path}/*.jsonl", f"{tmp_path}/*.parquet"], tmp_path)
    assert report["total"]["read"] == len(texts) + 5
    assert report["dropped"] == {"exact_duplicate": 2}
    assert set(report["languages"]) == {"de_DE", "ca_ES"}
