"""Perplexity by KenLM models, in CCNet's buckets."""

import json
import math
from pathlib import Path

import pytest
import sentencepiece

from data_pipelines import config_load
from data_pipelines.__main__ import main
from data_pipelines.config import PerplexityConfig, RecipeError
from data_pipelines.config_load import load_recipe
from data_pipelines.steps.perplexity import SortByPerplexity, normalised
from tests.test_pipeline import recipe
from tests.test_pipeline import small as small  # the fixture
from tests.test_pipeline_steps import declarations, document
from xlscale.data.shards import Corpus

STEPS = ("read", "extract", "identify", "exact", "near", "perplexity", "hold_out", "write", "verify")
UNKNOWN = -4.0  # log10 of a piece that is in no declaration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """de.arpa, a model of single pieces of half of a declaration, and de.sp.model, its pieces."""
    folder = tmp_path_factory.mktemp("models")
    lines = [normalised(line) for line in declarations()["deu_1996"][0].split("\n") if line]
    (folder / "text").write_text("\n".join(lines))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "de.sp"), vocab_size=300, minloglevel=2
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "de.sp.model"))
    counts: dict[str, int] = {}
    for line in lines[: len(lines) // 2]:
        for piece in [*pieces.encode(line, out_type=str), "</s>"]:
            counts[piece] = counts.get(piece, 0) + 1
    total = sum(counts.values())
    rows = [f"{math.log10(count / total):.6f}\t{piece}\t0" for piece, count in counts.items()]
    rows += [f"{UNKNOWN}\t<unk>\t0", "-99\t<s>\t0", "-9\t@@\t0"]
    text = ["\\data\\", f"ngram 1={len(rows)}", "ngram 2=1", "", "\\1-grams:", *rows, ""]
    # KenLM wants longer runs too.
    (folder / "de.arpa").write_text("\n".join([*text, "\\2-grams:", "-1\t@@ @@", "", "\\end\\", ""]))
    (folder / "cutoffs.toml").write_text("[de_DE]\nhead = 150\ntail = 300\n")
    return folder


def config(folder: Path, **more: object) -> PerplexityConfig:
    paths = {"models": f"{folder}/{{language}}.arpa", "tokenizers": f"{folder}/{{language}}.sp.model"}
    return PerplexityConfig(**{**paths, "cutoffs": f"{folder}/cutoffs.toml", **more})


def test_text_goes_to_the_model_as_ccnet_has_it():
    assert normalised("  Größe: „Élan“ – 2026, 東京。") == 'große: "elan" - 0000, 東京.'
    assert normalised("a\tb\x85…") == "ab..."


def test_perplexity_is_that_of_the_lines_pieces_and_decides_the_bucket(folder):
    pytest.importorskip("kenlm", reason="kenlm is compiled from source: pip install 'xlscale[kenlm]'")
    probabilities = {}
    for row in (folder / "de.arpa").read_text().split("\n"):
        number, *piece = row.split("\t")
        if piece:
            probabilities[piece[0]] = float(number)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "de.sp.model"))
    step = SortByPerplexity(config(folder))
    german = "\n".join(declarations()["deu_1996"][0].split("\n")[20:40])
    seen = {}
    signs = "qx% yq% " * 50
    for name, text in {"german": german, "mixed": f"{german}\n{signs * 8}", "signs": signs}.items():
        page = document(text, language="de_DE")
        step.process(page)
        scores = [probabilities.get(piece, UNKNOWN) for line in text.split("\n") if line
                  for piece in [*pieces.encode(normalised(line), out_type=str), "</s>"]]  # fmt: skip
        assert page.metadata["perplexity"] == pytest.approx(10 ** (-sum(scores) / len(scores)), rel=1e-3, abs=0.1)
        seen[name] = (page.metadata["bucket"], page.metadata.get("dropped"))
    assert seen == {"german": ("head", None), "mixed": ("middle", None), "signs": ("tail", "perplexity_tail")}
    head = SortByPerplexity(config(folder, keep=["tail"]))
    page = document(german, language="de_DE")
    head.process(page)
    assert page.metadata["dropped"] == "perplexity_head"
    other = document(german, language="fr_XX")  # has no model
    step.process(other)
    assert not other.metadata.keys() & {"bucket", "perplexity", "dropped"}


def test_bucket_stands_in_the_shards_and_the_dropped_ones_in_the_report(folder, small, tmp_path, monkeypatch):
    pytest.importorskip("kenlm", reason="kenlm is compiled from source: pip install 'xlscale[kenlm]'")
    paths = config(folder)
    cutoffs = tmp_path / "cutoffs.toml"
    cutoffs.write_text("[de_DE]\nhead = 110\ntail = 135\n")
    path = recipe(tmp_path, f"{small}/*.warc.gz", more=f"[perplexity]\nmodels = '{paths.models}'\n"
                  f"tokenizers = '{paths.tokenizers}'\ncutoffs = '{cutoffs}'\n")  # fmt: skip
    path.write_text(f"steps = {list(STEPS)}\n{path.read_text()}")
    assert main([str(path)]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    corpus = Corpus.open(tmp_path / "out/shards")
    buckets = {row.get("bucket") for row in corpus.read("de_DE")}
    assert buckets == {"head", "middle"}
    assert report["dropped"]["perplexity_tail"] > 0
    assert all("bucket" not in row for row in corpus.read("fr_XX"))
    before = load_recipe(path).hash
    cutoffs.write_text("[de_DE]\nhead = 110\ntail = 136\n")
    assert load_recipe(path).hash != before


def test_what_is_missing_for_perplexity_is_said_before_anything_runs(folder, tmp_path, monkeypatch):
    path = recipe(tmp_path, "x")
    path.write_text(f"steps = {list(STEPS)}\n{path.read_text()}")
    with pytest.raises(RecipeError, match=r"the step 'perplexity' needs perplexity\.models; give it"):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"nowhere.*no language has a file there"):
        SortByPerplexity(config(folder, models="nowhere/{language}"))
    (tmp_path / "fr.arpa").write_text("x")
    with pytest.raises(RecipeError, match=r"fr\.arpa: fr_XX needs a file of .* a head that is not above its tail"):
        SortByPerplexity(config(folder, models=f"{tmp_path}/{{language}}.arpa"))
    monkeypatch.setattr(config_load, "find_spec", lambda _: None)
    with pytest.raises(RecipeError, match=r"needs the package kenlm: pip install 'xlscale\[kenlm\]'"):
        load_recipe(path, [f"perplexity.models={folder}/x"])
