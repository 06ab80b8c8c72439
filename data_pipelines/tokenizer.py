"""The tokenizer of a recipe: trained on its shards, languages balanced; how well it cuts each language."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_pipelines.config import Recipe, RecipeError
from data_pipelines.progress import shown
from data_pipelines.recipe import locked
from data_pipelines.report import LOOK
from data_pipelines.steps.document import write_whole
from data_pipelines.steps.filter import weight
from data_pipelines.steps.write import read_heldout
from xlscale.data.shards import Corpus
from xlscale.tokenizer import SentencePieceTokenizer, sampled_texts, train_sentencepiece

SEED = 0  # of the order in which documents are drawn
BYTES_PER_BYTE = 19  # memory that SentencePiece takes per byte of text
LONGEST_UNSPACED = 12  # weighted letters per space from which a language is taken to be written without spaces


def run(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Trains <output>/tokenizer, unless it is there for these shards and settings; returns its report."""
    output = recipe.output
    if not (output / "report.json").exists():
        raise RecipeError([f"{output} has no finished shards; write them with `python -m data_pipelines CONFIG` first"])
    corpus = Corpus.open(output / "shards")
    settings = asdict(recipe.tokenizer)
    key = hashlib.sha256(json.dumps([settings, corpus.fingerprint], sort_keys=True).encode()).hexdigest()
    path = output / "tokenizer-report.json"
    with locked(output):
        if path.exists():
            result: dict[str, Any] = json.loads(path.read_text("utf-8"))
            if result["key"] == key and _digest(output / "tokenizer") == result["digest"]:
                console.print(f"{output}/tokenizer is up to date: same shards, same settings; nothing to do")
                return result
        path.unlink(missing_ok=True)
        tokenizer, characters = _train(recipe, corpus, console)
        result = {"key": key, "digest": tokenizer.digest, "settings": settings}
        result |= {"pieces": tokenizer.vocab_size, "characters": characters}
        result["languages"] = {code: measure(tokenizer, _texts(output, corpus, code)) for code in corpus.languages}
        write_whole(path, json.dumps(result, indent=1) + "\n")
        return result


def _train(recipe: Recipe, corpus: Corpus, console: Console) -> tuple[SentencePieceTokenizer, int]:
    """The tokenizer, and how many characters it learnt from."""
    cfg = recipe.tokenizer
    texts = list(sampled_texts(corpus, cfg.sampling_alpha, cfg.max_characters, SEED))
    characters, size = sum(map(len, texts)), sum(len(text.encode("utf-8")) for text in texts)
    memory = size * BYTES_PER_BYTE / 2**30
    title = f"tokenizer: {cfg.vocab_size} ids from {characters:,} characters, about {memory:.2f} GiB of memory"
    with shown(console, recipe.output / "work" / "none", "tokenizer", title):
        folder = recipe.output / "tokenizer"
        tokenizer = train_sentencepiece(texts, cfg.vocab_size, folder, cfg.character_coverage)
    return tokenizer, characters


def _digest(folder: Path) -> str:
    try:
        return SentencePieceTokenizer.load(folder).digest
    except (ValueError, OSError):
        return ""


def _texts(output: Path, corpus: Corpus, language: str) -> list[str]:
    """Held-out documents of a language; the first chunk of its shards where none were held out."""
    path = output / "heldout" / f"{language}.jsonl"
    held = read_heldout(path) if path.exists() else []
    return held or [document["text"] for document in corpus.read_chunk(language, 0)]


def measure(tokenizer: SentencePieceTokenizer, texts: list[str]) -> dict[str, Any]:
    """Tokens per word (None for a script without spaces) and per character, share of <unk>, on the texts."""
    ids = [token for text in texts for token in tokenizer.encode(text)]
    joined = "\n".join(texts)
    words, letters = len(joined.split()), weight("".join(joined.split()))
    spaced = letters / max(1, words) < LONGEST_UNSPACED
    return {
        "characters": len(joined),
        "tokens_per_word": round(len(ids) / max(1, words), 3) if spaced else None,
        "tokens_per_character": round(len(ids) / max(1, len(joined)), 4),
        "unknown": round(ids.count(tokenizer.unk_id) / max(1, len(ids)), 6),
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Prints fertility and unknown rate per language."""
    table = Table(title=f"tokenizer: {result['pieces']} ids, on held-out text", **LOOK)
    for name in ("language", "characters", "tokens/word", "tokens/character", "unknown"):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, row in result["languages"].items():
        per_word = "" if row["tokens_per_word"] is None else f"{row['tokens_per_word']:.2f}"
        table.add_row(
            language,
            f"{row['characters']:,}",
            per_word,
            f"{row['tokens_per_character']:.3f}",
            f"{row['unknown']:.2%}",
        )
    console.print(table)
