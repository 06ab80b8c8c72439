"""Tokens as the stream reads them: stored or made on the fly the same, verified, few of them open."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.corpora import documents
from tests.token_files import (
    contents,
    files,
    flip,
    spoil,
    times,
    token_shard,
    two_languages,
)
from xlscale.data import tokens as tokens_module
from xlscale.data.packing import Packing
from xlscale.data.shard_writer import ShardWriter
from xlscale.data.shards import Corpus, DamagedChunk
from xlscale.data.storage import Downloads
from xlscale.data.tokens import Tokens, prepare_tokens
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.tokenizer_bpe import load_tokenizer, train_bpe


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return two_languages(tmp_path / "shards")


def test_a_chunk_holds_the_ids_of_its_documents_with_their_ends(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokens: Tokens
) -> None:
    for language in tiny_corpus.languages:
        for number in range(tiny_corpus.chunks(language)):
            ids = [[*tiny_tokenizer.encode(d["text"]), 2] for d in tiny_corpus.read_chunk(language, number)]
            chunk = tiny_tokens.chunk(language, number)
            assert chunk.ids.tolist() == [i for document in ids for i in document]
            assert chunk.lengths.tolist() == [len(document) for document in ids]
            place, _ = tiny_corpus.shard(language, number)
            assert tiny_tokens.shard(language, number) == f"{language}/{tiny_corpus.records(language)[place].shard}"
        assert tiny_tokens.chunks(language) == tiny_corpus.chunks(language)
        assert tiny_tokens.size(language, "documents") == tiny_corpus.documents(language)
        assert tiny_tokens.size(language, "bytes") == tiny_corpus.bytes(language)
        sizes = [len(tiny_tokens.chunk(language, n).ids) for n in range(tiny_tokens.chunks(language))]
        assert tiny_tokens.size(language, "tokens") == sum(sizes)
    with pytest.raises(IndexError):
        tiny_tokens.chunk("de_DE", tiny_tokens.chunks("de_DE"))
    assert tiny_tokens.faults == {}


def test_the_files_are_as_documented(corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    assert tokens.folder == f"{tmp_path}/cache/tokens-{tiny_tokenizer.digest[:12]}-v2"
    numbers = np.fromfile(token_shard(tokens, "de_DE", 1, "lengths"), "<u4")
    chunks = [tokens.chunk("de_DE", number) for number in range(4, 8)]
    assert numbers[:4].tolist() == [16] * 4
    assert numbers[4:8].tolist() == [len(chunk.ids) for chunk in chunks]
    assert np.array_equal(numbers[12:], np.concatenate([chunk.lengths for chunk in chunks]))
    ids = np.fromfile(token_shard(tokens, "de_DE", 1), "<u2")
    assert np.array_equal(ids, np.concatenate([chunk.ids for chunk in chunks]))
    line = json.loads((Path(tokens.folder) / "de_DE" / "manifest.jsonl").read_bytes().splitlines()[1])
    assert (line["documents"], line["chunks"], line["tokens"]) == (64, 4, len(ids))
    assert line["ids_sha256"] == hashlib.sha256(ids.tobytes()).hexdigest()


def test_on_the_fly_gives_the_chunks_of_the_stored_shards_and_keeps_only_lengths(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    flying = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, on_the_fly=True, workers=2)
    assert not list(Path(flying.folder).rglob("*.tokens")) and times(flying.folder)
    assert contents(flying) == contents(tiny_tokens)
    assert flying.fingerprint == tiny_tokens.fingerprint
    for language in flying.languages:
        assert flying.size(language, "tokens") == tiny_tokens.size(language, "tokens")
        for one, other in zip(flying.lengths(language), tiny_tokens.lengths(language), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    stored = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path)
    assert files(stored.folder) == files(tiny_tokens.folder)
    again = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, on_the_fly=True, progress=pytest.fail)
    assert contents(again) == contents(tiny_tokens)


class OtherRelease(SentencePieceTokenizer):
    """Cuts otherwise than what it claims to be, as another release of the library might."""

    change: Callable[[np.ndarray], np.ndarray]

    def _encode(self, texts: Any, threads: int) -> list[np.ndarray]:
        return [type(self).change(ids) for ids in super()._encode(texts, threads)]


@pytest.mark.parametrize("change", [lambda ids: ids[:-1], lambda ids: np.where(ids == ids[0], 7, ids)])
def test_on_the_fly_refuses_other_tokens_than_were_counted(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path, change: Any
) -> None:
    prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache", on_the_fly=True)
    OtherRelease.change = staticmethod(change)
    other = OtherRelease(tiny_tokenizer.model)
    tokens = prepare_tokens(corpus, other, tmp_path / "cache", on_the_fly=True)
    with pytest.raises(ValueError, match=r"de_DE-000001\.tar: chunk 5 of de_DE gives \d+ tokens, .* counted") as error:
        tokens.chunk("de_DE", 5)
    assert not isinstance(error.value, DamagedChunk), "no sample is replaced for that"


@pytest.mark.parametrize("suffix", ["tokens", "lengths"])
@pytest.mark.parametrize(
    ("damage", "cause"),
    [(Path.unlink, "missing"), (lambda path: os.truncate(path, 200), "cut short"), (None, "checksum")],
)
def test_a_damaged_token_shard_names_itself_and_is_derived_anew_once_removed(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path, suffix: str, damage: Any, cause: str
) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    whole = contents(tokens)
    path = token_shard(tokens, "de_DE", 1, suffix)
    (damage or (lambda path: flip(path, path.stat().st_size - 300)))(path)
    fresh = pickle.loads(pickle.dumps(tokens))
    wanted = 4 if suffix == "lengths" or cause != "checksum" else 7
    with pytest.raises(DamagedChunk, match=rf"{path}: .*; remove it, and xlscale data tokenize makes it anew") as error:
        fresh.chunk("de_DE", wanted)
    assert (error.value.shard, error.value.cause) == (f"de_DE/{path.name}", cause)
    assert pickle.loads(pickle.dumps(error.value)).cause == cause
    others = [key for key in whole if key[0] == "ru_RU" or key[1] not in range(4, 8)]
    if suffix == "tokens" and cause == "checksum":
        others += [("de_DE", 4), ("de_DE", 5)]
    for language, number in others:
        chunk = fresh.chunk(language, number)
        assert chunk.ids.tobytes() + b"|" + chunk.lengths.tobytes() == whole[language, number]
    path.unlink(missing_ok=True)
    calls: list[int] = []
    mended = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache", progress=lambda done, _: calls.append(done))
    assert calls == [270 - 64, 270]
    assert contents(mended) == whole and mended.fingerprint == tokens.fingerprint


def test_a_token_shard_cut_while_it_is_in_use_does_not_end_the_process(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    tokens.chunk("de_DE", 4)
    os.truncate(token_shard(tokens, "de_DE", 1), 0)  # a page of the map now raises SIGBUS
    with pytest.raises(DamagedChunk, match="ends at byte") as error:
        tokens.chunk("de_DE", 5)
    assert error.value.cause == "cut short"


def test_block_starts_are_those_of_the_packing_made_once_and_mapped(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    for packing in (Packing("sentences", 32, True, 0, 1), Packing("documents", 32, True, 0, 1)):
        mapped = tokens.block_starts("de_DE", packing)
        assert mapped.dtype == np.int64 and isinstance(mapped.base, np.memmap)
        starts = np.array(mapped)
        for number in range(tokens.chunks("de_DE")):
            blocks = len(packing.plan(tokens.chunk("de_DE", number).lengths))
            assert starts[number + 1] - starts[number] == blocks
        assert starts[0] == 0 and len(starts) == tokens.chunks("de_DE") + 1
    layouts = Path(tokens.folder) / "layouts"
    written = {path: path.stat().st_mtime_ns for path in layouts.glob("*.npy")}
    assert len(written) == 2
    other = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache", on_the_fly=True)
    assert np.array_equal(other.block_starts("de_DE", packing), starts)
    assert {path: path.stat().st_mtime_ns for path in layouts.glob("*.npy")} == written
    for damage in (
        lambda path: flip(path, 150),
        lambda path: os.truncate(path, 160),
        lambda path: os.truncate(path, 2),
    ):
        (path,) = layouts.glob("de_DE-documents*")
        damage(path)
        with pytest.raises(ValueError, match=rf"{path} is not what was written; remove it"):
            tokens.block_starts("de_DE", packing)
        path.unlink()
        assert np.array_equal(tokens.block_starts("de_DE", packing), starts)


def test_open_shards_are_few_whatever_is_read(tiny_tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "_MOST_OPEN", 3)
    tokens = pickle.loads(pickle.dumps(tiny_tokens))
    whole = contents(tiny_tokens)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert contents(tokens) == whole
    assert len(tokens._opened) == 3
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert contents(tokens) == whole


def digest_in_a_child(tokens: Tokens, queue: "multiprocessing.Queue[object]") -> None:
    queue.put((contents(tokens), "torch" in sys.modules))


@pytest.mark.parametrize(("method", "on_the_fly"), [("fork", False), ("spawn", False), ("spawn", True)])
def test_tokens_in_use_can_be_forked_and_sent(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path, method: str, on_the_fly: bool
) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache", on_the_fly=on_the_fly)
    here = contents(tokens)
    if not on_the_fly:
        assert len(pickle.dumps(tokens)) < 10_000, "facts, not tokens"
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=digest_in_a_child, args=(tokens, queue))
    process.start()
    assert queue.get(timeout=60)[0] == here
    process.join()


def test_a_finished_cache_is_read_from_its_url_and_an_unfinished_one_refused(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    local = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    packing = Packing("sentences", 32, True, 0, 1)
    url = (tmp_path / "cache").as_uri()
    downloads = Downloads(tmp_path / "downloads", 1 << 30)
    tokens = prepare_tokens(corpus, tiny_tokenizer, url, downloads=downloads)
    tokens.read_ahead("de_DE", range(10))
    assert contents(tokens) == contents(local) and tokens.fingerprint == local.fingerprint
    assert tokens.folder.startswith("file://")
    assert np.array_equal(tokens.block_starts("ru_RU", packing), local.block_starts("ru_RU", packing))
    remote = Corpus.open(corpus.folder.as_uri(), downloads=downloads)
    derived = prepare_tokens(remote, tiny_tokenizer, tmp_path / "of remote", workers=2)
    assert files(derived.folder) == files(local.folder)
    flying = prepare_tokens(remote, tiny_tokenizer, tmp_path / "of remote", on_the_fly=True)
    flying.read_ahead("de_DE", range(10))
    assert contents(flying) == contents(local)
    assert [found.is_remote for found in (local, tokens, derived, flying)] == [False, True, False, True]
    token_shard(local, "ru_RU", 1).unlink()
    shutil.rmtree(tmp_path / "downloads")
    with pytest.raises(DamagedChunk, match="upload it anew") as error:
        pickle.loads(pickle.dumps(tokens)).chunk("ru_RU", 5)
    assert error.value.cause == "missing"
    shutil.rmtree(Path(local.folder) / "ru_RU")
    with pytest.raises(
        ValueError, match=r"token shards of 2 text shards are not there, the first that of ru_RU/ru_RU-0"
    ):
        prepare_tokens(corpus, tiny_tokenizer, url, downloads=downloads)
    flying = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "lengths", on_the_fly=True)
    only_lengths = (tmp_path / "lengths").as_uri()
    assert (
        prepare_tokens(corpus, tiny_tokenizer, only_lengths, on_the_fly=True, downloads=downloads)
        .chunk("ru_RU", 5)
        .ids.tolist()
        == flying.chunk("ru_RU", 5).ids.tolist()
    )
    with pytest.raises(ValueError, match="token shards of 5 text shards are not there"):
        prepare_tokens(corpus, tiny_tokenizer, only_lengths, downloads=downloads)
    with pytest.raises(ValueError, match="name a folder for what is downloaded"):
        prepare_tokens(corpus, tiny_tokenizer, url)


def test_documents_without_tokens_leave_no_trace(tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    texts = [" \n ", "ein Mensch", "\t", "frei"]
    with ShardWriter(tmp_path / "shards", "de_DE", "tests", "0", documents_per_chunk=2) as writer:
        for text in texts:
            writer.write({"text": text})
    tokens = prepare_tokens(Corpus.open(tmp_path / "shards"), tiny_tokenizer)
    for number in (0, 1):
        chunk = tokens.chunk("de_DE", number)
        assert chunk.lengths[0] == 0
        assert chunk.ids.tolist() == [*tiny_tokenizer.encode(texts[2 * number + 1]), 2]


def test_large_vocabularies_and_small_ones_come_back_as_the_same_ids(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    small = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "small")
    large_tokenizer = SentencePieceTokenizer(tiny_tokenizer.model)
    large_tokenizer.vocab_size = 250_002  # decides the width of the stored ids
    large = prepare_tokens(corpus, large_tokenizer, tmp_path / "large")
    flying = prepare_tokens(corpus, large_tokenizer, tmp_path / "large", on_the_fly=True)
    assert token_shard(large, "de_DE", 1).stat().st_size == 2 * token_shard(small, "de_DE", 1).stat().st_size
    for language, number in contents(small):
        ids = small.chunk(language, number).ids
        assert ids.dtype == np.dtype("<u2")
        for other in (large, flying):
            assert other.chunk(language, number).ids.dtype == np.dtype("<u4")
            assert np.array_equal(other.chunk(language, number).ids, ids)


@pytest.mark.parametrize("prefix_space", [False, True])
def test_a_byte_level_bpe_tokenizer_gives_token_shards_too(corpus: Corpus, tmp_path: Path, prefix_space: bool) -> None:
    spoil(corpus, "ru_RU", 0, b'{"id":"ru_RU-3"', b'["id":"ru_RU-3"')
    corpus = Corpus.open(corpus.folder)
    train_bpe([d["text"] for d in documents("ru_RU", 100)], 450, tmp_path / "bpe")
    tokenizer: Any = load_tokenizer(tmp_path / "bpe")
    tokenizer = type(tokenizer)(*tokenizer._files.values(), prefix_space)
    tokens = prepare_tokens(corpus, tokenizer, tmp_path / "cache", max_bad_documents=1)
    flying = prepare_tokens(corpus, tokenizer, tmp_path / "cache", max_bad_documents=1, on_the_fly=True)
    assert contents(flying) == contents(tokens)
    texts, _ = corpus.read_texts("ru_RU", 0, 10**6)
    chunk = tokens.chunk("ru_RU", 0)
    assert chunk.lengths[3] == 0 and texts[3] == "", "a document with a fault"
    begins = " " if prefix_space else ""
    assert tokenizer.decode(chunk.ids) == "".join(begins + text for text in texts if text)
