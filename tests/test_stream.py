"""The stream: a slot is the same sample at any world size and after any interruption."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.corpora import write_shards
from xlscale.config_sections import MaskingConfig
from xlscale.data.packing import pack_documents
from xlscale.data.sampling import QUOTA_BLOCK, language_quotas, language_shares, micro_batch_slots
from xlscale.data.shards import Corpus
from xlscale.data.stream import ORDER_VERSION, Batch, Stream
from xlscale.data.tokens import TokenShards, prepare_tokens
from xlscale.tokenizer import SentencePieceTokenizer
from xlscale.tokenizer_bpe import load_tokenizer, train_bpe

GLOBAL_BATCH_SIZE = 24


@pytest.fixture(scope="module")
def stream(tiny_tokens: TokenShards, tiny_tokenizer: SentencePieceTokenizer) -> Stream:
    return Stream(tiny_tokens, tiny_tokenizer, MaskingConfig(), seed=11, sampling_alpha=0.3)


def contents(batch: Batch) -> bytes:
    """Everything of a batch that training sees."""
    padding = np.ones_like(batch.input_ids, dtype=bool) if batch.attention_mask is None else batch.attention_mask
    return b"".join(a.tobytes() for a in (batch.input_ids, batch.labels, padding, batch.languages, batch.slots))


def global_batch(stream: Stream, step: int, dp: int, accumulation: int) -> list[bytes]:
    """The rows of an update in slot order, gathered from every rank's micro-batches."""
    size = GLOBAL_BATCH_SIZE // (dp * accumulation)
    rows = {}
    for micro_step in range(accumulation):
        for rank in range(dp):
            slots = micro_batch_slots(step, micro_step, rank, dp, size, GLOBAL_BATCH_SIZE)
            batch = stream.batch(slots)
            for row, slot in enumerate(batch.slots.tolist()):
                arrays = (batch.input_ids[row], batch.labels[row], batch.languages[row : row + 1])
                rows[slot] = b"".join(a.tobytes() for a in arrays)
    return [rows[slot] for slot in sorted(rows)]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("dp", [2, 3, 4])
def test_the_global_batch_is_the_same_at_any_world_size_and_accumulation(
    stream: Stream, dp: int, accumulation: int
) -> None:
    for step in (0, 1, 170, 171):  # the quota block ends between the last two
        assert global_batch(stream, step, dp, accumulation) == global_batch(stream, step, 1, 1)


def test_a_resumed_stream_is_the_uninterrupted_one(
    stream: Stream, tiny_tokens: TokenShards, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    whole = [stream.batch(np.arange(i, i + 8)) for i in range(0, 80, 8)]
    state = json.loads(json.dumps(stream.state_dict(40)))
    # another process: nothing in memory but what the state says
    resumed = Stream(TokenShards(tiny_tokens.folder), tiny_tokenizer, MaskingConfig(), seed=11, sampling_alpha=0.3)
    resumed.check_state(state)
    rest = [resumed.batch(np.arange(i, i + 8)) for i in range(state["slot"], 80, 8)]
    assert [contents(batch) for batch in rest] == [contents(batch) for batch in whole[5:]]


def test_in_one_epoch_of_a_language_every_block_comes_once(stream: Stream) -> None:
    wanted = 3 * max(stream.blocks_per_language)
    languages, blocks, epochs = stream.locate(np.arange(40 * wanted))
    for language, count in enumerate(stream.blocks_per_language):
        mine = languages == language
        orders = []
        for epoch in range(int(epochs[mine].max())):  # the last one has only begun
            order = blocks[mine & (epochs == epoch)]
            assert np.array_equal(np.sort(order), np.arange(count))
            orders.append(tuple(order.tolist()))
        assert len(orders) >= 3
        assert len(set(orders)) == len(orders), "another order in every epoch"


def test_a_block_drawn_twice_gets_another_mask(stream: Stream) -> None:
    languages, blocks, _ = stream.locate(np.arange(20_000))
    slots = np.flatnonzero((languages == 0) & (blocks == 0))
    assert len(slots) >= 5
    batch = stream.batch(slots)
    originals = np.where(batch.labels >= 0, batch.labels, batch.input_ids)
    assert (originals == originals[0]).all(), "the same tokens below the mask"
    assert len({row.tobytes() for row in batch.labels}) == len(slots)


def test_samples_hold_what_the_shards_hold(
    stream: Stream, tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    languages, blocks, _ = stream.locate(np.arange(500))
    batch = stream.batch(np.arange(500))
    for index, language in enumerate(stream.languages):
        chunks = [tiny_corpus.read_chunk(language, i) for i in range(tiny_corpus.chunks(language))]
        ids = [[np.array(tiny_tokenizer.encode(document["text"])) for document in chunk] for chunk in chunks]
        packed = np.concatenate([pack_documents(chunk, 32, 0, 2, 1) for chunk in ids])
        assert len(packed) == stream.blocks_per_language[index]
        mine = languages == index
        originals = np.where(batch.labels >= 0, batch.labels, batch.input_ids)[mine]
        assert np.array_equal(originals, packed[blocks[mine]])
    assert np.array_equal(batch.languages, languages)


def test_shares_of_the_languages_are_those_of_the_quotas(stream: Stream) -> None:
    expected = np.array(stream.blocks_per_language, dtype=float) ** 0.3
    assert np.allclose(stream.probabilities, expected / expected.sum(), atol=1e-8)
    shares = language_shares(stream.blocks_per_language, 0.3)
    for block in (0, 7, 10**6):
        languages = stream.locate(np.arange(block * QUOTA_BLOCK, (block + 1) * QUOTA_BLOCK))[0]
        assert np.bincount(languages, minlength=7).tolist() == language_quotas(shares, block)[1]


def test_the_attention_mask_is_there_only_when_something_is_padded(stream: Stream) -> None:
    batch = stream.batch(np.arange(2000))
    padded = (batch.input_ids == 1).any(axis=1)
    assert padded.any()
    assert batch.attention_mask is not None
    assert np.array_equal(batch.attention_mask, batch.input_ids != 1)
    assert (batch.labels[~batch.attention_mask] == -100).all()
    assert stream.batch(np.flatnonzero(~padded)[:50]).attention_mask is None


def synthetic_tokens(folder: Path) -> TokenShards:
    """Token shards with fixed contents, whatever the tokenizer's trainer does."""
    folder.mkdir()
    facts = {"ar_AR": 50, "de_DE": 700, "en_XX": 3000, "zh_CN": 3}
    for start, (language, blocks) in enumerate(facts.items()):
        ids = (np.arange(blocks * 16, dtype=np.int64) * 31 + start) % 490 + 4
        (folder / f"{language}.bin").write_bytes(ids.astype("<u2").tobytes())
    manifest = {
        "fingerprint": "f" * 64,
        "tokenizer": "",
        "sequence_length": 16,
        "dtype": "<u2",
        "languages": {code: {"blocks": n, "tokens": n, "documents": n} for code, n in facts.items()},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return TokenShards(folder)


def test_the_order_and_the_masks_of_a_fixed_manifest_never_change(
    tmp_path: Path, tiny_tokenizer: SentencePieceTokenizer
) -> None:
    # If this changes, runs in progress can no longer be resumed: raise ORDER_VERSION with it.
    tokens = synthetic_tokens(tmp_path / "tokens")
    tokens.tokenizer = tiny_tokenizer.digest
    stream = Stream(tokens, tiny_tokenizer, MaskingConfig(), seed=1234, sampling_alpha=0.3)
    digest = hashlib.sha256()
    for first in (0, 5000, 10**9):
        digest.update(contents(stream.batch(np.arange(first, first + 1000))))
    assert ORDER_VERSION == 1
    assert digest.hexdigest() == "a0375beeb73b726f7fa17fca075288c1e0cb981a781433aa8f21c9fd506b65e0"


@pytest.mark.parametrize(
    ("name", "value"),
    [("order_version", 0), ("corpus", "0" * 64), ("tokenizer", "0" * 64), ("sequence_length", 512),
     ("languages", ["de_DE"]), ("sampling_alpha", 0.7), ("seed", 1)],
)  # fmt: skip
def test_a_state_of_another_stream_is_refused_by_name(stream: Stream, name: str, value: object) -> None:
    state = stream.state_dict(17)
    stream.check_state(state)
    with pytest.raises(ValueError, match=rf"^{name} was .* and is .* now: .* start a run of another name$"):
        stream.check_state({**state, name: value})
    with pytest.raises(ValueError, match=rf"^{name} was None"):
        stream.check_state({key: value for key, value in state.items() if key != name})


def test_all_that_differs_is_named_at_once(stream: Stream) -> None:
    with pytest.raises(ValueError, match="tokenizer was") as refused:
        stream.check_state({**stream.state_dict(0), "tokenizer": "x", "seed": 5, "slot": 99})
    assert len(str(refused.value).splitlines()) == 2


def batch_in_a_child(stream: Stream, slots: list[int], queue: "multiprocessing.Queue[bytes]") -> None:
    queue.put(contents(stream.batch(slots)))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_stream_in_use_can_be_forked_and_sent_to_another_process(stream: Stream, method: str) -> None:
    slots = list(range(100, 140))
    here = contents(stream.batch(slots))
    assert len(pickle.dumps(stream)) < 20_000, "positions and facts, not the tokens"
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=batch_in_a_child, args=(stream, slots, queue))
    process.start()
    assert queue.get(timeout=60) == here
    process.join()


@pytest.mark.parametrize("seed", [-1, 1 << 63])
def test_a_seed_that_is_no_key_is_refused(
    tiny_tokens: TokenShards, tiny_tokenizer: SentencePieceTokenizer, seed: int
) -> None:
    with pytest.raises(ValueError, match=f"seed={seed} must lie between"):
        Stream(tiny_tokens, tiny_tokenizer, MaskingConfig(), seed=seed, sampling_alpha=0.3)


def test_token_shards_are_derived_once_with_progress(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    first = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path, lambda done, total: calls.append((done, total)))
    assert calls[-1] == (770, 770)
    assert calls == sorted(calls)
    before = len(calls)
    again = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path, lambda done, total: calls.append((done, total)))
    assert len(calls) == before
    assert again.folder == first.folder
    other = prepare_tokens(tiny_corpus, tiny_tokenizer, 128, tmp_path)
    german = prepare_tokens(Corpus.open(tiny_corpus.folder, ["de_DE"]), tiny_tokenizer, 64, tmp_path)
    assert len({first.folder, other.folder, german.folder}) == 3
    assert np.array_equal(german.blocks("de_DE"), first.blocks("de_DE"))
    assert first.languages["de_DE"].documents == 150
    packed = first.blocks("de_DE")
    assert first.languages["de_DE"].tokens == ((packed != 0) & (packed != 1)).sum()


def test_the_default_place_of_token_shards_is_beside_the_text_shards(
    tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    write_shards(tmp_path / "shards", "de_DE", 3)
    tokens = prepare_tokens(Corpus.open(tmp_path / "shards"), tiny_tokenizer, 64)
    assert tokens.folder.parent == tmp_path / "tokens"


def test_a_damaged_chunk_stops_the_derivation_and_leaves_nothing(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    shutil.copytree(tiny_corpus.folder, tmp_path / "shards")
    shard = tmp_path / "shards" / "ru_RU" / "ru_RU-000001.tar"
    data = bytearray(shard.read_bytes())
    data[2000] ^= 4
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"ru_RU-000001\.tar: chunk 4 of ru_RU .* the shard is damaged"):
        prepare_tokens(Corpus.open(tmp_path / "shards"), tiny_tokenizer, 64, tmp_path / "tokens")
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".lock"]


def prepare_and_report(
    corpus: Corpus,
    tokenizer: SentencePieceTokenizer,
    cache: Path,
    queue: "multiprocessing.Queue[object]",
    die: bool,
) -> None:
    derived = []

    def progress(done: int, total: int) -> None:
        derived.append(done)
        if die and done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    tokens = prepare_tokens(corpus, tokenizer, 64, cache, progress)
    queue.put((bool(derived), hashlib.sha256(tokens.blocks("en_XX").tobytes()).hexdigest()))


def test_of_processes_that_start_together_one_derives_and_all_use_it(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (tiny_corpus, tiny_tokenizer, tmp_path, queue, False)
    processes = [context.Process(target=prepare_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    reports = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(derived for derived, _ in reports) == [False, False, True]
    assert len({digest for _, digest in reports}) == 1


def test_a_derivation_killed_half_way_leaves_nothing_that_counts_and_the_next_one_is_whole(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tiny_corpus, tiny_tokenizer, tmp_path, context.Queue(), True)
    process = context.Process(target=prepare_and_report, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    tokens = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path)
    whole = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path / "elsewhere")
    assert all(np.array_equal(tokens.blocks(code), whole.blocks(code)) for code in tiny_corpus.languages)
    assert not list(tmp_path.glob(".*.tmp"))


def test_token_shards_cut_short_or_missing_are_one_clear_error(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tokens = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path)
    os.truncate(tokens.folder / "de_DE.bin", 1000)
    with pytest.raises(ValueError, match=r"de_DE\.bin: 1000 bytes, manifest.json says \d+ bytes; remove .* anew"):
        prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path)
    (tokens.folder / "de_DE.bin").unlink()
    with pytest.raises(ValueError, match=r"de_DE\.bin: missing"):
        prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path)
    (tokens.folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json cannot be read .* remove .* anew"):
        prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path)


def test_a_language_without_a_token_and_a_length_without_room_are_refused(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    from xlscale.data.shards import ShardWriter

    with ShardWriter(tmp_path / "shards", "fi_FI", "tests", "0") as writer:
        writer.write({"text": " \n\t "})
    with pytest.raises(ValueError, match=r"fi_FI: its shards hold no token; leave it out of data\.languages"):
        prepare_tokens(Corpus.open(tmp_path / "shards"), tiny_tokenizer, 64, tmp_path / "tokens")
    with pytest.raises(ValueError, match="sequence_length=1 must be at least 2"):
        prepare_tokens(tiny_corpus, tiny_tokenizer, 1, tmp_path)


def test_large_vocabularies_and_small_ones_come_back_as_the_same_ids(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    small = prepare_tokens(tiny_corpus, tiny_tokenizer, 64, tmp_path / "small")
    large_tokenizer = SentencePieceTokenizer(tiny_tokenizer.model)
    large_tokenizer.vocab_size = 250_002  # decides the width of the stored ids
    large = prepare_tokens(tiny_corpus, large_tokenizer, 64, tmp_path / "large")
    assert (small.dtype, large.dtype) == (np.dtype("<u2"), np.dtype("<u4"))
    assert all(np.array_equal(small.blocks(code), large.blocks(code)) for code in small.languages)


def test_a_byte_level_bpe_tokenizer_streams_too(tiny_corpus: Corpus, tmp_path: Path) -> None:
    """RoBERTa's kind of tokenizer: the samples are the packed ids of the chunk, and read back as its text."""
    texts = [document["text"] for language in tiny_corpus.languages for document in tiny_corpus.read(language)]
    train_bpe(texts, 600, tmp_path / "bpe")
    tokenizer = load_tokenizer(tmp_path / "bpe")
    tokens = prepare_tokens(tiny_corpus, tokenizer, 32, tmp_path / "tokens")
    stream = Stream(tokens, tokenizer, MaskingConfig(), seed=3, sampling_alpha=0.3)
    assert stream.batch(np.arange(16)).input_ids.max() == tokenizer.mask_id
    chunk = [document["text"] for document in tiny_corpus.read_chunk("ru_RU", 0)]
    packed = pack_documents(tokenizer.encode_batch(chunk), 32, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
    blocks = tokens.blocks("ru_RU")[: len(packed)]
    assert np.array_equal(blocks, packed)
    # A character may be cut between two blocks, so they are read back as one.
    assert tokenizer.decode(blocks[:, 1:].ravel()) == "".join(chunk)
