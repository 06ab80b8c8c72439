"""The tokenizer of a recipe: its memory budget, and another tokenizer beside it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from data_pipelines.__main__ import main
from data_pipelines.page import write_page
from tests.test_pipeline_steps import archive, declarations, page, record
from xlscale.data.shard_writer import ShardWriter
from xlscale.data.shards import Corpus
from xlscale.tokenizer import sampled_texts
from xlscale.tokenizer_bpe import ByteLevelBPETokenizer, load_tokenizer

RECIPE = """
[run]
output = "{0}/out"
[read]
archives = ["{0}/a.warc.gz"]
[tokenizer]
vocab_size = 900
max_characters = 60000
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A folder of finished shards of five languages."""
    folder, records = tmp_path_factory.mktemp("finished"), []
    for name in ("deu_1996", "fra", "rus", "jpn", "arb"):
        lines = [line for line in declarations()[name][0].split("\n") if line]
        records += [
            record(f"http://{name}.test/{i}", page("\n".join(lines[i : i + 6])).encode())
            for i in range(0, len(lines) - 6, 6)
        ]
    archive(folder / "a.warc.gz", records)
    (folder / "recipe.toml").write_text(RECIPE.format(folder))
    assert main([str(folder / "recipe.toml")]) == 0
    return folder


@pytest.fixture
def written(finished, tmp_path) -> tuple[Path, Path]:
    """(recipe, output): a copy of them."""
    shutil.copytree(finished / "out", tmp_path / "out")
    (tmp_path / "recipe.toml").write_text(RECIPE.format(tmp_path))
    return tmp_path / "recipe.toml", tmp_path / "out"


def test_tokenizer_over_its_memory_budget_is_refused_before_anything_is_read(written, capsys):
    config, out = written
    assert main(["tokenizer", str(config), "--set", "tokenizer.max_memory_gib=0.001"]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    found = re.search(
        r"tokenizer\.max_characters = 60000 takes about \S+ GiB .*\.max_memory_gib = 0\.001; .* to (\d+)", error
    )
    assert not (out / "tokenizer").exists()
    # Two of the five languages take a byte for a character, two take 2 and one takes 3.
    assert 2**30 / 1000 / 19 / 2.2 < int(found[1]) < 2**30 / 1000 / 19 / 1.4
    arguments = ["tokenizer", str(config), "--set", "tokenizer.max_memory_gib=0.001", "--set"]
    assert main([*arguments, f"tokenizer.max_characters={found[1]}", "--set", "tokenizer.vocab_size=600"]) == 0


def test_tokenizer_is_measured_against_another_one_on_the_same_text(written, capsys):
    config, out = written
    command, report = ["tokenizer", str(config)], out / "tokenizer-report.json"
    assert main(command) == 0
    ours = out / "tokenizer"
    assert main([*command, "--against", str(ours)]) == 0
    output = capsys.readouterr().out
    assert "nothing to train" in output
    assert f"against {ours}: 900 ids" in " ".join(output.split())
    result = json.loads(report.read_text())
    assert result["against"]["languages"] == result["languages"]

    json_only, words = out / "json", out / "words"  # the same without its model; one that knows no word
    json_only.mkdir()
    shutil.copy(ours / "tokenizer.json", json_only)
    assert main([*command, "--against", str(json_only)]) == 0
    assert json.loads(report.read_text())["against"]["languages"] == result["languages"]
    words.mkdir()
    whitespace = Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]"))
    whitespace.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    whitespace.save(str(words / "tokenizer.json"))
    assert main([*command, "--against", str(words)]) == 0
    against = json.loads(report.read_text())["against"]
    assert against["pieces"] == 1
    assert {row["unknown"] for row in against["languages"].values()} == {1.0}
    assert against["languages"]["de_DE"]["tokens_per_word"] == 1
    capsys.readouterr()
    assert main([*command, "--against", str(out)]) == 2
    assert re.search(
        r"--against .* holds neither sentencepiece.* nor tokenizer.json nor vocab.json; give", capsys.readouterr().err
    )


def test_byte_bpe_spells_everything_and_leaves_no_file_of_the_kind_before(written, capsys):
    config, out = written
    assert main(["tokenizer", str(config)]) == 0
    command = ["tokenizer", str(config), "--set", "tokenizer.kind=byte_bpe"]
    assert main(command) == 0
    assert {path.name for path in (out / "tokenizer").iterdir()} >= {"vocab.json", "merges.txt", "tokenizer.json"}
    assert not (out / "tokenizer/sentencepiece.bpe.model").exists()
    tokenizer = load_tokenizer(out / "tokenizer")
    assert isinstance(tokenizer, ByteLevelBPETokenizer)
    assert tokenizer.vocab_size == 900
    text = "Alle Menschen, \U0001f600 \u0f40\u0f7c"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    report = json.loads((out / "tokenizer-report.json").read_text())
    assert {row["unknown"] for row in report["languages"].values()} == {0.0}
    assert report["languages"]["de_DE"]["tokens_per_word"] > 1
    capsys.readouterr()
    vocabulary = out.parent / "vocabulary"  # as RoBERTa's folder was before tokenizer.json
    vocabulary.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(out / "tokenizer" / name, vocabulary)
    assert main([*command, "--against", str(vocabulary)]) == 0
    assert "nothing to train" in capsys.readouterr().out
    assert json.loads((out / "tokenizer-report.json").read_text())["against"]["languages"] == report["languages"]


def test_training_that_fails_leaves_the_tokenizer_that_was_there_and_its_report(written, capsys):
    config, out = written
    assert main(["tokenizer", str(config)]) == 0
    before = {path: path.read_bytes() for path in [*(out / "tokenizer").iterdir(), out / "tokenizer-report.json"]}
    for kind in ("unigram", "byte_bpe"):
        arguments = ["--set", f"tokenizer.kind={kind}", "--set", "tokenizer.vocab_size=250000"]
        assert main(["tokenizer", str(config), *arguments]) == 2
        assert "largest possible" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_coverage_of_byte_bpe_is_refused_for_it_has_no_effect(written, capsys):
    arguments = ["--set", "tokenizer.kind=byte_bpe", "--set", "tokenizer.character_coverage=0.99"]
    assert main(["tokenizer", str(written[0]), *arguments]) == 2
    assert "tokenizer.character_coverage has no effect on byte_bpe" in capsys.readouterr().err


def test_page_has_the_tokenizer_of_these_shards_and_of_no_others(written):
    config, out = written
    arguments = ["tokenizer", str(config), "--against", str(out / "tokenizer")]
    assert main(arguments[:2]) == 0
    assert main(arguments) == 0
    text = (out / "report.html").read_text("utf-8")
    assert "unigram, 900 ids, learnt from" in text
    assert f"Orange, against: {out}/tokenizer, 900 ids." in text
    assert "tokens/word, against" in text
    report = json.loads((out / "tokenizer-report.json").read_text())
    (out / "tokenizer-report.json").write_text(json.dumps(report | {"fingerprint": "of others"}))
    assert "None was trained" in write_page(out).read_text("utf-8")


def test_sample_reads_no_more_chunks_than_it_needs(tmp_path):
    class Counting(Corpus):
        read = 0

        def read_chunk(self, language, number):
            self.read += 1
            return super().read_chunk(language, number)

    for language, documents in (("de_DE", 4000), ("fr_XX", 40)):
        writer = ShardWriter(tmp_path, language, "test", "sha256:0", 10, 16)
        for number in range(documents):
            writer.write({"id": f"{number:04d}", "text": f"{number:04d}" * 25})
        writer.close()
    corpus = Counting.open(tmp_path)
    assert corpus.chunks("de_DE") == 400
    texts = list(sampled_texts(corpus, 1.0, 20_000, 0))
    assert 20_000 <= sum(map(len, texts)) < 22_000
    assert corpus.read <= 22
    assert len({text[0] for text in texts}) == 4  # and not the first ones


@pytest.mark.slow
def test_training_takes_about_the_memory_that_was_predicted(tmp_path):
    """From 6 MB of the demo's corpus, in processes of their own."""
    assert main(["configs/data_demo.toml", "--set", f"run.output={tmp_path}/out"]) == 0
    code = f"""
import sys
from pathlib import Path
from data_pipelines.config_load import load_recipe
from data_pipelines.tokenizer import TRAINERS, predicted_memory
from xlscale.data.shards import Corpus
from xlscale.tokenizer import sampled_texts

corpus = Corpus.open("{tmp_path}/out/shards")
settings = ["max_characters=4_000_000", "vocab_size=16000", "kind=" + sys.argv[1]]
cfg = load_recipe("configs/data_demo.toml", ["tokenizer." + setting for setting in settings]).tokenizer
peak = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
texts, before = sampled_texts(corpus, 0.3, cfg.max_characters, 0), peak()
TRAINERS[cfg.kind](texts, cfg, "{tmp_path}/tokenizer")
print(peak() - before, predicted_memory(corpus, cfg))
"""
    for kind in ("unigram", "byte_bpe"):
        done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, timeout=300)
        taken, predicted = map(float, done.stdout.split())
        assert 0.5 * predicted < taken < predicted + 0.02, (kind, done.stdout, done.stderr)  # GiB; the library's own
