"""Deriving token shards: once, resumably, the same in any number of processes."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.corpora import documents, write_shards
from tests.token_files import (
    children,
    contents,
    files,
    flip,
    is_running,
    text_shard,
    times,
    token_shard,
    two_languages,
    wait_until,
)
from xlscale.data.packing import Packing
from xlscale.data.shard_writer import ShardWriter
from xlscale.data.shards import Corpus
from xlscale.data.tokens import Tokens, prepare_tokens
from xlscale.tokenizer import SentencePieceTokenizer

REPO = Path(__file__).parents[1]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return two_languages(tmp_path / "shards")


def test_token_shards_are_derived_once_with_progress(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    calls: list[tuple[int, int]] = []
    first = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, progress=lambda *call: calls.append(call))
    assert calls[0] == (0, 770) and calls[-1] == (770, 770)
    assert calls == sorted(calls)
    before, written = len(calls), times(tmp_path)
    again = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, progress=lambda *call: calls.append(call))
    german = Corpus.open(tiny_corpus.folder, ["de_DE"])
    part = prepare_tokens(german, tiny_tokenizer, tmp_path, progress=lambda *call: calls.append(call))
    assert len(calls) == before and times(tmp_path) == written
    assert again.fingerprint == first.fingerprint != part.fingerprint
    assert part.languages == ["de_DE"]
    assert contents(part).items() <= contents(first).items()


def test_the_default_place_of_token_shards_is_beside_the_text_shards(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    tokens = prepare_tokens(corpus, tiny_tokenizer)
    assert Path(tokens.folder).parent == tmp_path / "tokens"


def test_any_number_of_workers_writes_the_same_bytes(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    calls: list[int] = []
    tokens = prepare_tokens(
        tiny_corpus, tiny_tokenizer, tmp_path, workers=3, progress=lambda done, total: calls.append(done)
    )
    assert files(tokens.folder) == files(tiny_tokens.folder)
    assert tokens.fingerprint == tiny_tokens.fingerprint
    assert len(calls) == 1 + sum(len(tiny_corpus.records(language)) for language in tiny_corpus.languages)


def prepare_and_report(
    corpus: Corpus, tokenizer: SentencePieceTokenizer, cache: Path, queue: "multiprocessing.Queue[object]"
) -> None:
    derived: list[int] = []
    tokens = prepare_tokens(corpus, tokenizer, cache, progress=lambda done, total: derived.append(done))
    queue.put((bool(derived), tokens.fingerprint, hashlib.sha256(tokens.chunk("de_DE", 7).ids).hexdigest()))


def test_of_processes_that_start_together_one_derives_and_all_use_it(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    arguments = (tiny_corpus, tiny_tokenizer, tmp_path, queue)
    processes = [context.Process(target=prepare_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    reports: list[Any] = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(report[0] for report in reports) == [False, False, True]
    assert len({report[1:] for report in reports}) == 1


def derive_and_die(corpus: Corpus, tokenizer: SentencePieceTokenizer, cache: Path, workers: int, shards: int) -> None:
    """Kills itself, as the machine's power would, once so many shards are done."""
    calls: list[int] = []

    def progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > shards:
            (cache / "children").write_text(" ".join(map(str, children())))
            os.kill(os.getpid(), signal.SIGKILL)

    prepare_tokens(corpus, tokenizer, cache, workers=workers, progress=progress)


def kill_a_derivation(*arguments: Any) -> None:
    process = multiprocessing.get_context("fork").Process(target=derive_and_die, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


def test_a_derivation_killed_half_way_goes_on_shard_by_shard(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    for shards in (4, 0, 3):  # twice more, the second time before anything is done
        kill_a_derivation(tiny_corpus, tiny_tokenizer, tmp_path, 1, shards)
    (folder,) = tmp_path.glob("tokens-*")
    # what a writer leaves that was killed in the middle of things
    manifest = folder / "en_XX" / "manifest.jsonl"
    lines = manifest.read_bytes()
    assert lines.count(b"\n") == 2
    manifest.write_bytes(lines + lines[:100])
    (folder / "de_DE" / ".de_DE-000001-00000000.tokens.1.tmp").write_bytes(b"half")
    (folder / "en_XX" / token_shard(tiny_tokens, "en_XX", 4).name).write_bytes(b"without a line it does not count")
    before = times(folder)
    calls: list[int] = []
    tokens = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, progress=lambda done, total: calls.append(done))
    whole = sum(len(tiny_corpus.records(language)) for language in tiny_corpus.languages)
    assert len(calls) == 1 + whole - 7 and calls[0] > 0, "seven shards were done"
    after = times(folder)
    assert all(after[path] == written for path, written in before.items() if "en_XX" not in path)
    assert files(folder) == files(tiny_tokens.folder)
    assert tokens.fingerprint == tiny_tokens.fingerprint


def test_processes_that_derive_die_with_their_parent_and_what_they_did_stays(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokens: Tokens, tmp_path: Path
) -> None:
    kill_a_derivation(tiny_corpus, tiny_tokenizer, tmp_path, 2, 5)
    left = [int(pid) for pid in (tmp_path / "children").read_text().split()]
    assert len(left) >= 2
    wait_until(lambda: not any(map(is_running, left)), "no child outlives its parent")
    calls: list[int] = []
    tokens = prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, progress=lambda done, total: calls.append(done))
    whole = sum(len(tiny_corpus.records(language)) for language in tiny_corpus.languages)
    assert len(calls) == 1 + whole - 5
    assert files(tokens.folder) == files(tiny_tokens.folder)


class Busy(SentencePieceTokenizer):
    """Takes its time over every chunk, and says in `folder` who does."""

    folder: Path

    def _encode(self, texts: Any, threads: int) -> list[np.ndarray]:
        (self.folder / str(os.getpid())).touch()
        time.sleep(60)
        raise AssertionError("nobody waits for it")


def prepare_interruptibly(*args: Any, **options: Any) -> None:
    """In a process that Ctrl-C reaches, even where all this runs in the background of a shell, which ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    prepare_tokens(*args, **options)


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
def test_processes_at_work_die_with_their_parent(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path, way: signal.Signals
) -> None:
    tokenizer = Busy(tiny_tokenizer.model)
    tokenizer.folder = tmp_path / "busy"
    tokenizer.folder.mkdir()
    options = {"workers": 2}
    process = multiprocessing.get_context("fork").Process(
        target=prepare_interruptibly, args=(corpus, tokenizer, tmp_path / "cache"), kwargs=options
    )
    process.start()
    wait_until(lambda: len(list(tokenizer.folder.iterdir())) == 2, "two processes work")
    assert process.pid is not None
    os.kill(process.pid, way)
    process.join(10)
    pids = [int(path.name) for path in tokenizer.folder.iterdir()]
    wait_until(lambda: not any(map(is_running, pids)), "no child outlives its parent")
    assert times(tmp_path / "cache") == {}


def test_a_killed_worker_is_one_clear_error(
    tiny_corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    before = set(children())

    def progress(done: int, total: int) -> None:
        if done:
            for pid in set(children()) - before:
                if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(ValueError, match=r"[a-z]{2}_[A-Z]{2}-\d+\.tar: the process that tokenised it was killed; if m"):
        prepare_tokens(tiny_corpus, tiny_tokenizer, tmp_path, workers=2, progress=progress)


def test_a_corpus_that_grows_and_one_that_changes_derive_what_is_new(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tmp_path: Path
) -> None:
    old = prepare_tokens(corpus, tiny_tokenizer, tmp_path / "cache")
    held, before = contents(old), times(old.folder)
    with ShardWriter(corpus.folder, "de_DE", "tests", "0" * 8, documents_per_chunk=16, chunks_per_shard=4) as writer:
        for document in documents("el_GR", 20):
            writer.write(document)
    calls: list[int] = []

    def prepare() -> Tokens:
        calls.clear()
        opened = Corpus.open(corpus.folder)
        return prepare_tokens(opened, tiny_tokenizer, tmp_path / "cache", progress=lambda done, _: calls.append(done))

    grown = prepare()
    assert calls == [270, 290]
    assert grown.fingerprint != old.fingerprint
    assert contents(old) == held, "one that is open is not disturbed"
    assert held.items() <= contents(grown).items()
    # other text in a shard of the same name
    shutil.rmtree(corpus.folder / "ru_RU")
    write_shards(corpus.folder, "ru_RU", 100)
    changed = prepare()
    assert calls[0] == 170 + 64, "the first Russian shard is as it was"
    assert contents(old) == held
    assert changed.size("ru_RU", "documents") == 100
    now = times(old.folder)
    assert all(now[path] == written for path, written in before.items())
    assert prepare().fingerprint == changed.fingerprint and not calls


def test_the_command_makes_the_token_shards_that_training_reads(
    corpus: Corpus, tiny_tokenizer: SentencePieceTokenizer, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    flip(text_shard(corpus, "ru_RU", 0), 2000)

    def tokenize(*more: str) -> subprocess.CompletedProcess[str]:
        settings = [f"data.shards={corpus.folder}", f"data.tokenizer={tiny_tokenizer_folder}", *more]
        command = [sys.executable, "-m", "xlscale.cli", "data", "tokenize", "configs/demo.toml", "--workers", "2"]
        sets = [part for setting in settings for part in ("--set", setting)]
        return subprocess.run([*command, *sets], cwd=REPO, capture_output=True, text=True, timeout=120)

    refused = tokenize()
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert "xlscale: ru_RU/ru_RU-000000.tar: 16 documents: checksum" in refused.stderr
    done = tokenize("faults.max_bad_documents=16")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tokens = prepare_tokens(corpus, tiny_tokenizer, max_bad_documents=16, progress=pytest.fail)
    assert lines[1].split()[:3] == ["de_DE", "150", f"{tokens.size('de_DE', 'tokens'):,d}"]
    packing = Packing("sentences", 64, True, 0, 1)
    assert int(lines[1].split()[3]) == tokens.block_starts("de_DE", packing)[-1]
    assert lines[3].split()[:2] == ["all", "270"]
    assert lines[4] == "ru_RU: documents left out: 16 checksum"
    assert lines[5] == tokens.folder


def test_processes_do_not_run_the_script_that_starts_them_once_more(
    tiny_corpus: Corpus, tiny_tokenizer_folder: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from xlscale.data.shards import Corpus\n"
        "from xlscale.data.tokens import prepare_tokens\n"
        "from xlscale.tokenizer_bpe import load_tokenizer\n"
        f"corpus = Corpus.open({str(tiny_corpus.folder)!r})\n"
        f"tokenizer = load_tokenizer({str(tiny_tokenizer_folder)!r})\n"
        f"prepare_tokens(corpus, tokenizer, {str(tmp_path / 'tokens')!r}, workers=2)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert files(tmp_path / "tokens", "**/*.lengths")
