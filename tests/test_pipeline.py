"""data_pipelines as a person runs it: recipes, faults, reruns and the tokenizer."""

import filecmp
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_pipelines.__main__ import main
from data_pipelines.config import RecipeError
from data_pipelines.config_load import load_recipe
from tests.test_pipeline_steps import SAMPLE, archive, declarations, page, record
from xlscale.data.shards import Corpus
from xlscale.tokenizer import SentencePieceTokenizer

DEMO = Path(__file__).parents[1] / "configs/data_demo.toml"


def recipe(tmp_path: Path, archives: str, output: str = "out", more: str = "") -> Path:
    """A recipe's file."""
    path = tmp_path / f"{output}.toml"
    run = f'[run]\noutput = "{tmp_path / output}"\n[read]\narchives = ["{archives}"]\n'
    path.write_text(f"{run}{more}")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An archive of paragraphs of five declarations: some pages twice, some nearly, some no page."""
    folder = tmp_path_factory.mktemp("small")
    records = []
    for name in ("deu_1996", "fra", "rus", "jpn", "arb"):
        lines = [line for line in declarations()[name][0].split("\n") if line]
        for i in range(0, len(lines) - 6, 6):
            records.append(record(f"http://{name}.test/{i}", page("\n".join(lines[i : i + 6])).encode()))
    first = declarations()["deu_1996"][0].split("\n\n")[3:12]
    records.append(record("http://deu_1996.test/again", page("\n".join(first)).encode()))
    records.append(record("http://deu_1996.test/almost", page("\n".join([*first, "Noch etwas."])).encode()))
    records.append(record("http://deu_1996.test/copy", page("\n".join(first)).encode()))
    records.append(record("http://deu_1996.test/missing", b"no", status="404 Not Found"))
    middle = len(records) // 2
    archive(folder / "a.warc.gz", records[:middle])
    archive(folder / "b.warc.gz", records[middle:])
    return folder


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """The output of a finished run, and its report."""
    folder = tmp_path_factory.mktemp("done")
    assert main([str(recipe(folder, f"{small}/*.warc.gz"))]) == 0
    return folder / "out", json.loads((folder / "out/report.json").read_text())


def same(a: Path, b: Path) -> bool:
    """Whether two outputs have the same shards, held-out and dropped documents, to the byte."""
    files = [
        sorted(
            path.relative_to(root) for name in ("shards", "heldout", "dropped") for path in (root / name).rglob("*.*")
        )
        for root in (a, b)
    ]
    assert len(files[0]) > 5
    return files[0] == files[1] and not filecmp.cmpfiles(a, b, map(str, files[0]), shallow=False)[1]


def test_what_was_read_is_what_was_kept_and_what_was_dropped_by_reason(done):
    output, report = done
    total = report["total"]
    assert total["read"] == total["training"] + total["heldout"] + total["dropped"]
    assert total["dropped"] == sum(report["dropped"].values())
    assert total["read"] == sum(row["records"]["response"] for row in report["archives"])
    for row in report["languages"].values():
        assert row["read"] == row["training"] + row["heldout"] + sum(row["dropped"].values())
    corpus = Corpus.open(output / "shards")
    assert {code: corpus.documents(code) for code in corpus.languages} == {
        code: row["training"] for code, row in report["languages"].items() if row["training"]
    }
    assert {"exact_duplicate", "near_duplicate", "not_ok"} <= set(report["dropped"])
    assert report["dropped"]["not_ok"] == 1
    assert {path.stem for path in (output / "dropped").glob("*.jsonl")} == set(report["dropped"])


def test_documents_are_ordered_by_id_and_held_out_ones_are_not_in_training(done):
    output, report = done
    corpus = Corpus.open(output / "shards")
    assert corpus.languages == ["ar_AR", "de_DE", "fr_XX", "ja_XX", "ru_RU"]
    for code in corpus.languages:
        documents = list(corpus.read(code))
        ids = [document["id"] for document in documents]
        assert ids == sorted(set(ids))
        held = [json.loads(line) for line in (output / f"heldout/{code}.jsonl").read_bytes().splitlines()]
        assert len(held) == report["languages"][code]["heldout"] >= 1
        assert not {document["id"] for document in held} & set(ids)
        trained = {line for document in documents for line in document["text"].split("\n") if len(line) > 60}
        assert not trained & {line for document in held for line in document["text"].split("\n")}
        assert all(document["url"] and document["archive"] for document in documents)


def test_second_run_gives_the_same_bytes_with_two_workers_too(small, done, tmp_path):
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    assert main([str(config), "--set", "run.workers=2"]) == 0
    assert same(done[0], tmp_path / "out")


def test_finished_run_is_not_repeated_until_something_changes(small, tmp_path, capsys):
    config = recipe(tmp_path, f"{small}/a.warc.gz")
    assert main([str(config)]) == 0
    shard = next((tmp_path / "out/shards").glob("*/*.tar"))
    before = shard.stat().st_mtime_ns
    assert main([str(config)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert shard.stat().st_mtime_ns == before
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])  # damaged: made again
    assert main([str(config)]) == 0
    assert shard.read_bytes() == content
    assert main([str(config), "--set", "heldout.min_documents=3"]) == 0  # another recipe
    assert "up to date" not in capsys.readouterr().out
    assert not (tmp_path / "out/work").exists()


def test_compressed_shards_hold_the_same_documents(small, done, tmp_path):
    config = recipe(tmp_path, f"{small}/*.warc.gz", more='[shards]\ncompression = "zstd"\n')
    assert main([str(config)]) == 0
    plain, packed = Corpus.open(done[0] / "shards"), Corpus.open(tmp_path / "out/shards")
    for code in plain.languages:
        assert list(packed.read(code)) == list(plain.read(code))
        assert {record.format for record in packed.records(code)} == {"jsonl.zst"}


def test_run_killed_while_it_publishes_goes_on(small, done, tmp_path, monkeypatch):
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    rename = Path.rename

    def stop_at_heldout(path: Path, target: Path) -> Path:
        if path.name == "heldout":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", stop_at_heldout)
        assert main([str(config)]) == 130
    assert (tmp_path / "out/shards").exists()
    assert not (tmp_path / "out/report.json").exists()
    assert main([str(config)]) == 0
    assert same(done[0], tmp_path / "out")
    assert json.loads((tmp_path / "out/report.json").read_text())["fingerprint"] == done[1]["fingerprint"]


def test_cut_archive_is_counted_in_the_report_and_beyond_the_budget_stops(small, tmp_path, capsys):
    whole = (small / "b.warc.gz").read_bytes()
    (tmp_path / "cut.warc.gz").write_bytes(whole[: len(whole) // 2])
    config = recipe(tmp_path, f"{tmp_path}/cut.warc.gz", more="[shards]\nmin_documents = 1\n")
    assert main([str(config), "--set", "read.max_faults=0"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert re.search(
        r"cut\.warc\.gz has 1 damaged places.*read\.max_faults = 0.*cut short.*raise read\.max_faults", error
    )
    assert not (tmp_path / "out/shards").exists()
    assert main([str(config)]) == 0
    assert "damaged" in capsys.readouterr().out
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert len(report["archives"][0]["faults"]) == 1
    assert report["total"]["training"] >= 3
    # Beside a good one it is left out, loudly.
    (tmp_path / "a.warc.gz").write_bytes((small / "a.warc.gz").read_bytes())
    config = recipe(tmp_path, f"{tmp_path}/*.warc.gz", "beside")
    assert main([str(config), "--set", "read.max_faults=0"]) == 0
    assert re.search(r"LEFT OUT: .*cut\.warc\.gz has 1 damaged places", capsys.readouterr().out)
    assert json.loads((tmp_path / "beside/report.json").read_text())["dropped"]["bad_archive"] > 10


def test_misspelt_key_is_one_clear_line_and_exits_2(tmp_path, capsys):
    config = recipe(tmp_path, "x.warc.gz", more="[filter]\nmin_charcters = 3\n")
    assert main([str(config)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "unknown key filter.min_charcters; did you mean filter.min_characters?" in error


def test_all_problems_of_a_recipe_are_shown_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('loose = 1\n[reed]\nx = 1\n[extract]\ntimeout_seconds = "1"\n[heldout]\nfraction = 0.9\n')
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["identify.languages=['en_US']", "run.workers", "shards.compression=gzip"])
    text = "\n".join(caught.value.problems)
    for part in (
        "loose stands outside",
        "unknown section [reed]; did you mean read?",
        "extract.timeout_seconds = '1' must be a number",
        "heldout.fraction = 0.9 must be from 0 to 0.5",
        "shards.compression = 'gzip' must be one of none, zstd",
        "did you mean 'en_XX'",
        "--set run.workers: has no value",
        "run.output has no default",
        "read.archives has no default",
    ):
        assert part in text, part


def test_overrides_and_defaults_of_the_demo_recipe():
    demo = load_recipe(DEMO, ["heldout.fraction=0.1", "run.output=elsewhere", "tokenizer.sampling_alpha=1"])
    assert (demo.heldout.fraction, demo.run.output, demo.tokenizer.sampling_alpha) == (0.1, "elsewhere", 1.0)
    plain = load_recipe(DEMO)
    assert plain.tokenizer.sampling_alpha == 0.3
    assert plain.hash == load_recipe(DEMO, ["run.output=elsewhere", "run.workers=2"]).hash
    assert plain.hash != demo.hash


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere.toml"], "recipe nowhere.toml does not exist; there are configs/data_commoncrawl.toml, configs/"),
        (
            [str(DEMO), "--set", "read.archives=['no/*.warc.gz']", "--set", "run.output={out}"],
            "no file no/*.warc.gz",
        ),
        (["tokenizer", str(DEMO), "--set", "run.output={out}"], "has no finished shards; write them with"),
    ],
)
def test_errors_of_people_are_one_line_and_exit_2(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    assert main([argument.format(out=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert expected in error


def test_folders_that_are_not_ours_are_not_replaced(small, tmp_path, capsys):
    (tmp_path / "out/shards").mkdir(parents=True)
    (tmp_path / "out/shards/precious").write_text("mine")
    assert main([str(recipe(tmp_path, f"{small}/*.warc.gz"))]) == 2
    assert "not made by data_pipelines; give another run.output" in capsys.readouterr().err
    assert (tmp_path / "out/shards/precious").read_text() == "mine"


def test_help_is_clear():
    run = subprocess.run([sys.executable, "-m", "data_pipelines", "--help"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "python -m data_pipelines tokenizer RECIPE" in run.stdout
    assert max(map(len, run.stdout.splitlines())) <= 110


def test_tokenizer_is_trained_on_the_shards_and_skipped_when_up_to_date(small, tmp_path, capsys):
    config = recipe(tmp_path, f"{small}/*.warc.gz", more="[tokenizer]\nvocab_size = 900\nmax_characters = 60000\n")
    steps = ["read", "extract", "identify", "filter", "exact", "near", "hold_out", "write", "verify", "tokenizer"]
    config.write_text(f"steps = {steps}\n{config.read_text()}")
    assert main([str(config)]) == 0  # the tokenizer is one of the steps
    assert "tokens/word" in capsys.readouterr().out
    tokenizer = SentencePieceTokenizer.load(tmp_path / "out/tokenizer")
    assert tokenizer.vocab_size == 900
    report = json.loads((tmp_path / "out/tokenizer-report.json").read_text())
    assert set(report["languages"]) == {"ar_AR", "de_DE", "fr_XX", "ja_XX", "ru_RU"}
    assert report["languages"]["ja_XX"]["tokens_per_word"] is None
    assert 1 < report["languages"]["de_DE"]["tokens_per_word"] < 6
    assert report["languages"]["de_DE"]["unknown"] < 0.01
    capsys.readouterr()
    assert main(["tokenizer", str(config)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["tokenizer", str(config), "--set", "tokenizer.vocab_size=20000"]) == 2
    assert "largest possible" in capsys.readouterr().err


def test_demo_recipe_makes_many_languages_from_the_sample(tmp_path, monkeypatch):
    monkeypatch.chdir(DEMO.parents[1])
    started = time.monotonic()
    assert main([str(DEMO), "--set", f"run.output={tmp_path}/out"]) == 0
    seconds = time.monotonic() - started
    report = json.loads((tmp_path / "out/report.json").read_text())
    corpus = Corpus.open(tmp_path / "out/shards")
    assert len(corpus.languages) >= 14
    assert {"en_XX", "ru_RU", "ar_AR", "ja_XX", "zh_CN", "el_GR"} <= set(corpus.languages)  # six scripts
    assert report["total"]["read"] == sum(1 for _ in (SAMPLE / "pages.tsv").open()) - 1
    assert report["languages"]["en_XX"]["dropped"]["near_duplicate"] >= 15
    characters = {code: row["characters"].get("training", 0) for code, row in report["languages"].items()}
    assert sum(characters.values()) > 3e6
    assert seconds < 60
