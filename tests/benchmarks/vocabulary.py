"""What new pieces do to old text at each discount, and what extending a vocabulary of XL's size takes.

    python -m tests.benchmarks.vocabulary cuts SHARDS      # of `python -m data_pipelines configs/data_demo.toml`
    python -m tests.benchmarks.vocabulary size SHARDS FOLDER [HIDDEN]

cuts: 1,000 pieces of one language after the other, added to 16,000 of six others; a tenth of its documents is held out.
size: a model of one layer and 250,880 rows is written into FOLDER, which needs 8,000 bytes for each of HIDDEN and is
emptied again; 1,000 pieces are added, and time and peak resident memory (VmHWM, pages of mapped files included) are
printed for the plan, the losses and the writing.
"""

import re
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from xlscale.checkpoint.pretrained import save_pretrained
from xlscale.data.shards import Corpus
from xlscale.extend_vocabulary import VocabularyChanges, plan_vocabulary
from xlscale.models.families import preset
from xlscale.models.heads import ForMaskedLM
from xlscale.tokenizer import SentencePieceTokenizer, sampled_texts, train_sentencepiece
from xlscale.vocabulary_pieces import Candidate, Cuts, appended, choose_pieces, learn_candidates, measure_change
from xlscale.vocabulary_rows import sources

OLD = ("ar_AR", "de_DE", "en_XX", "fr_XX", "ru_RU", "zh_CN")
NEW = ("es_XX", "id_ID", "it_IT", "ja_XX", "tr_TR", "vi_VN")
DISCOUNTS = (0, 2, 4, 5, 6, 8, 10)
PIECES, IDS, ROWS = 1000, 16_000, 250_880


def old_tokenizer(shards: str) -> SentencePieceTokenizer:
    """16,000 pieces of the six old languages."""
    with tempfile.TemporaryDirectory() as folder:
        return train_sentencepiece(sampled_texts(Corpus.open(shards, OLD), 0.5, 3_000_000, 0), IDS, folder)


def cuts(shards: str) -> None:
    old = old_tokenizer(shards)
    old_texts = [d["text"] for code in OLD for d in Corpus.open(shards, [code]).read(code)]
    print(
        "| language | discount | old tokens cut otherwise | old documents | tokens, new / old |\n|---|---|---|---|---|"
    )
    for code in NEW:
        texts = [d["text"] for d in Corpus.open(shards, [code]).read(code)]
        learning = [text for i, text in enumerate(texts) if i % 10]
        for discount in DISCOUNTS:
            choice = choose_pieces(old, learn_candidates(old, learning, PIECES, discount), learning, PIECES)
            new = choice.tokenizer
            before, here = (measure_change(old, new, sources(old, new), found) for found in (old_texts, texts[::10]))
            tokens, documents = before.changed_tokens / before.tokens, before.changed_documents / before.documents
            print(f"| {code} | {discount} | {tokens:.3%} | {documents:.1%} | {here.new_tokens / here.tokens:.4f} |")


def peak() -> float:
    """GB of resident memory at most so far."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024 / 1e9


def size(shards: str, folder: Path, hidden: int) -> None:
    old = old_tokenizer(shards)
    lowest, draw = Cuts(old).lowest, np.random.default_rng(0)
    letters = [chr(c) for c in range(0x10000, 0x10000 + 60)]  # of no text
    fill = {"".join(draw.choice(letters, 6)) for _ in range(ROWS)}
    many = appended(old, [Candidate(piece, lowest, 1) for piece in sorted(fill)[: 250_002 - old.vocab_size]])
    config = preset("xlm-roberta-xl", hidden_size=hidden, num_hidden_layers=1, intermediate_size=4 * hidden)
    save_pretrained(ForMaskedLM(config), folder / "old", many)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start, before = time.time(), peak()
    changes = VocabularyChanges(corpus=shards, language="id_ID", pieces=PIECES)
    made = plan_vocabulary(folder / "old", changes)
    largest = ROWS * hidden * 4 / 1e9
    print(f"{many.vocab_size:,} ids, {hidden} hidden: {before:.2f} GB before, largest tensor {largest:.2f} GB")
    for name, step in (
        ("plan", lambda: None),
        ("write", lambda: made.write(folder / "new")),
        ("losses", made.losses),
    ):
        found = step()
        print(f"{name}: {time.time() - start:.0f} s, peak {peak():.2f} GB {found or ''}")
        start = time.time()
        Path("/proc/self/clear_refs").write_text("5")
    assert replace(made.opened.model, vocab_size=made.model.vocab_size) == made.model


if __name__ == "__main__":
    if sys.argv[1] == "cuts":
        cuts(sys.argv[2])
    else:
        where = Path(sys.argv[3])
        with tempfile.TemporaryDirectory(dir=where) as inside:
            size(sys.argv[2], Path(inside), int(sys.argv[4]) if len(sys.argv) > 4 else 2560)
