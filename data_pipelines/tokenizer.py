"""The tokenizer of a recipe: trained on its shards, languages balanced; how well it cuts each language, and
how well another tokenizer does.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from data_pipelines.config import Recipe, RecipeError, TokenizerConfig
from data_pipelines.page import TOKENIZER_REPORT, write_page
from data_pipelines.progress import shown
from data_pipelines.recipe import locked
from data_pipelines.report import LOOK
from data_pipelines.steps.document import write_whole
from data_pipelines.steps.filter import weight
from data_pipelines.steps.write import read_heldout
from xlscale.data.shards import Corpus
from xlscale.tokenizer import MODEL_FILE, SentencePieceTokenizer, sampled_texts, train_sentencepiece
from xlscale.tokenizer_bpe import VOCAB_FILE, ByteLevelBPETokenizer, load_tokenizer, train_bpe

SEED = 0  # of the order in which documents are drawn
# Memory that training takes per byte of text, at most. Measured: unigram 20 to 21; byte_bpe 10 to 17 where words have
# spaces between them (66 MB, 30k to 250k ids), 39 where not (Chinese, Japanese).
BYTES_PER_BYTE = {"unigram": 21, "byte_bpe": 40}
TRAINERS: dict[str, Callable[[Iterator[str], TokenizerConfig, Path], "Trained"]] = {
    "unigram": lambda texts, cfg, folder: train_sentencepiece(texts, cfg.vocab_size, folder, cfg.character_coverage),
    "byte_bpe": lambda texts, cfg, folder: train_bpe(texts, cfg.vocab_size, folder),
}
PIPELINE_FILE = "tokenizer.json"  # of the Hub, for all other kinds of tokenizers
LONGEST_UNSPACED = 12  # weighted letters per space from which a language is taken to be written without spaces

Trained = SentencePieceTokenizer | ByteLevelBPETokenizer


def run(recipe: Recipe, console: Console, against: str = "") -> dict[str, Any]:
    """Trains <output>/tokenizer, unless it is there for these shards and settings; returns its report.

    `against`: the folder of another tokenizer, which is measured on the same text.
    """
    output, other = recipe.output, Other(against) if against else None
    if not (output / "report.json").exists():
        raise RecipeError([f"{output} has no finished shards; write them with `python -m data_pipelines CONFIG` first"])
    corpus = Corpus.open(output / "shards")
    settings = asdict(recipe.tokenizer)
    del settings["max_memory_gib"]  # decides nothing in the result
    key = hashlib.sha256(json.dumps([settings, corpus.fingerprint], sort_keys=True).encode()).hexdigest()
    path = output / TOKENIZER_REPORT
    with locked(output):
        result = _finished(path, key)
        if result:
            console.print(f"{output}/tokenizer is up to date: same shards, same settings; nothing to train")
        else:
            result = {"key": key, "fingerprint": corpus.fingerprint} | _train(recipe, corpus, console)
            write_whole(path, json.dumps(result, indent=1) + "\n")
        known = result.get("against", {})
        if other and (known.get("folder"), known.get("digest")) != (against, other.digest):
            rows = {
                code: measure(other.encode, other.unk_id, _texts(output, corpus, code)) for code in corpus.languages
            }
            result["against"] = {"folder": against, "digest": other.digest, "pieces": other.pieces, "languages": rows}
            write_whole(path, json.dumps(result, indent=1) + "\n")
        write_page(output)
        return result


class Other:
    """A tokenizer that others have made: a SentencePiece model of the Hub, any tokenizer.json, or RoBERTa's files."""

    def __init__(self, folder: str):
        self.encode: Callable[[str], list[int]]
        self.unk_id: int | None
        there = [name for name in (MODEL_FILE, PIPELINE_FILE, VOCAB_FILE) if (Path(folder) / name).is_file()]
        if not there:
            raise RecipeError([f"--against {folder}: holds neither {MODEL_FILE} nor {PIPELINE_FILE} nor {VOCAB_FILE}; "
                               "give a tokenizer's folder as on the Hub"])  # fmt: skip
        if there[0] != PIPELINE_FILE:
            model = load_tokenizer(folder)
            self.encode, self.unk_id, self.digest, self.pieces = (
                model.encode, model.unk_id, model.digest, model.vocab_size)  # fmt: skip
            return
        path = Path(folder) / PIPELINE_FILE
        content = path.read_bytes()
        try:
            pipeline = Tokenizer.from_buffer(content)
        except Exception as error:  # the library raises nothing narrower
            raise RecipeError([f"--against {path}: cannot be read ({error}); copy it anew"]) from None
        unknown = json.loads(content)["model"]
        # Unigram gives the id, other models the piece; byte-level models have neither: nothing is unknown to them.
        name = unknown.get("unk_token")
        self.unk_id = unknown.get("unk_id") if name is None else pipeline.token_to_id(name)
        self.encode = lambda text: pipeline.encode(text, add_special_tokens=False).ids
        self.digest, self.pieces = hashlib.sha256(content).hexdigest(), pipeline.get_vocab_size()


def _finished(path: Path, key: str) -> dict[str, Any]:
    """The report of a tokenizer that is there for these shards and settings, or {}."""
    result: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    same = result.get("key") == key and _digest(path.with_name("tokenizer")) == result["digest"]
    return result if same else {}


def predicted_memory(corpus: Corpus, cfg: TokenizerConfig) -> float:
    """GiB that learning takes, languages balanced by cfg.sampling_alpha: from the shards' manifests alone."""
    weights, widths = [], []
    for code in corpus.languages:
        records = corpus.records(code)
        available = sum(record.characters for record in records)
        weights.append(available**cfg.sampling_alpha)
        widths.append(sum(record.bytes for record in records) / available)  # bytes of UTF-8 a character
    width = sum(weight * width for weight, width in zip(weights, widths, strict=True)) / sum(weights)
    return cfg.max_characters * width * BYTES_PER_BYTE[cfg.kind] / 2**30


def _train(recipe: Recipe, corpus: Corpus, console: Console) -> dict[str, Any]:
    """Trains <output>/tokenizer and tells of it; RecipeError if that needs more memory than it may take."""
    cfg = recipe.tokenizer
    memory = predicted_memory(corpus, cfg)
    if memory > cfg.max_memory_gib:
        fitting = int(cfg.max_characters * cfg.max_memory_gib / memory)
        raise RecipeError(
            [
                f"tokenizer.max_characters = {cfg.max_characters} takes about {memory:.2g} GiB of memory, more than "
                f"tokenizer.max_memory_gib = {cfg.max_memory_gib:g}; lower it to {fitting} or raise the budget"
            ]
        )
    characters = 0

    def texts() -> Iterator[str]:
        nonlocal characters
        for text in sampled_texts(corpus, cfg.sampling_alpha, cfg.max_characters, SEED):
            characters += len(text)
            yield text

    title = f"tokenizer: {cfg.vocab_size} ids from {cfg.max_characters:,} characters, about {memory:.2f} GiB of memory"
    folder, beside = recipe.output / "tokenizer", recipe.output / ".tokenizer"
    with shown(console, recipe.output / "work" / "none", "tokenizer", title):
        shutil.rmtree(beside, ignore_errors=True)  # of a training that was killed
        tokenizer = TRAINERS[cfg.kind](texts(), cfg, beside)
        (recipe.output / TOKENIZER_REPORT).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)  # whole: one of another kind has other files
        beside.rename(folder)
    encode: Callable[[str], list[int]] = tokenizer.encode
    return {
        "digest": tokenizer.digest,
        "settings": asdict(cfg),
        "pieces": tokenizer.vocab_size,
        "characters": characters,
        "memory_gib": round(memory, 3),
        "languages": {
            code: measure(encode, tokenizer.unk_id, _texts(recipe.output, corpus, code)) for code in corpus.languages
        },
    }


def _digest(folder: Path) -> str:
    try:
        return load_tokenizer(folder).digest
    except (ValueError, OSError):
        return ""


def _texts(output: Path, corpus: Corpus, language: str) -> list[str]:
    """Held-out documents of a language; the first chunk of its shards where none were held out."""
    path = output / "heldout" / f"{language}.jsonl"
    held = read_heldout(path) if path.exists() else []
    return held or [document["text"] for document in corpus.read_chunk(language, 0)]


def measure(encode: Callable[[str], list[int]], unknown: int | None, texts: list[str]) -> dict[str, Any]:
    """Tokens per word (None for a script without spaces) and per character, share of <unk>, on the texts.

    `unknown`: the id of <unk>, None where a tokenizer has none.
    """
    ids = [token for text in texts for token in encode(text)]
    joined = "\n".join(texts)
    words, letters = len(joined.split()), weight("".join(joined.split()))
    spaced = letters / max(1, words) < LONGEST_UNSPACED
    return {
        "characters": len(joined),
        "tokens_per_word": round(len(ids) / max(1, words), 3) if spaced else None,
        "tokens_per_character": round(len(ids) / max(1, len(joined)), 4),
        "unknown": round(ids.count(unknown) / max(1, len(ids)), 6) if unknown is not None else 0.0,
    }


def show(result: dict[str, Any], console: Console, compare: bool = False) -> None:
    """Prints fertility and unknown rate per language, beside those of the other tokenizer if it is to be compared."""
    other = result["against"] if compare else {"languages": {}}
    title = f"tokenizer: {result['settings']['kind']}, {result['pieces']} ids, on held-out text"
    if compare:
        title += f"; against {other['folder']}: {other['pieces']} ids"
    table = Table(title=title, **LOOK)
    names = ["tokens/word", "tokens/character", "unknown"]
    for name in ("language", "characters", *names, *(f"{name}\nagainst" for name in names if compare)):
        table.add_column(name, justify="left" if name == "language" else "right")
    for language, row in result["languages"].items():
        cells = [*_cells(row), *(_cells(other["languages"][language]) if compare else ())]
        table.add_row(language, f"{row['characters']:,}", *cells)
    console.print(table)


def _cells(row: dict[str, Any]) -> tuple[str, str, str]:
    per_word = "" if row["tokens_per_word"] is None else f"{row['tokens_per_word']:.2f}"
    return per_word, f"{row['tokens_per_character']:.3f}", f"{row['unknown']:.2%}"
