"""Text shards: valid WebDatasets, the same bytes every time, published whole or not at all, checked."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import tarfile
from pathlib import Path

import pytest

from tests.corpora import DOCUMENTS, documents, write_shards
from xlscale.data.shards import Corpus, ShardWriter

Tree = dict[str, str]


def digests(folder: Path) -> Tree:
    """sha256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def german(tmp_path: Path) -> Path:
    """A folder of three German shards: 4, 4 and 2 chunks, 150 documents."""
    write_shards(tmp_path / "shards", "de_DE", 150)
    return tmp_path / "shards"


def test_what_was_written_is_read_back_in_order(tiny_corpus: Corpus) -> None:
    assert tiny_corpus.languages == sorted(DOCUMENTS)
    for language, count in DOCUMENTS.items():
        assert list(tiny_corpus.read(language)) == documents(language, count)
        assert tiny_corpus.documents(language) == count
        assert tiny_corpus.chunks(language) == -(-count // 16)


def test_text_with_every_kind_of_line_end_comes_back_unchanged(tmp_path: Path) -> None:
    texts = ["a\nb\r\nc\rd", "\x0b \x0c \x1c \x85 \u2028 \u2029", "\x00 \x7f \U0010ffff", '"\\{}']
    with ShardWriter(tmp_path, "en_XX", "line\u2028ends", "0") as writer:
        for text in texts:
            writer.write({"text": text})
    assert [document["text"] for document in Corpus.open(tmp_path).read("en_XX")] == texts


def test_shards_are_the_same_bytes_from_run_to_run(german: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", "de_DE", 150)
    assert digests(german) == digests(tmp_path / "again")
    assert Corpus.open(german).fingerprint == Corpus.open(tmp_path / "again").fingerprint


def test_the_fingerprint_changes_with_a_document_a_language_or_the_order(tiny_corpus: Corpus, tmp_path: Path) -> None:
    folder = tiny_corpus.folder
    prints = {tiny_corpus.fingerprint, Corpus.open(folder, ["de_DE"]).fingerprint}
    for name, texts in {"a": ["x", "y"], "b": ["y", "x"], "c": ["x", "z"]}.items():
        with ShardWriter(tmp_path / name, "en_XX", "tests", "0") as writer:
            for text in texts:
                writer.write({"text": text})
        prints.add(Corpus.open(tmp_path / name).fingerprint)
    assert len(prints) == 5


def test_a_shard_is_a_webdataset_to_webdataset_itself(german: Path) -> None:
    import webdataset

    shards = sorted(str(path) for path in (german / "de_DE").glob("*.tar"))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"{number:08d}" for number in range(10)]
    texts = [json.loads(line)["text"] for sample in samples for line in sample["jsonl"].splitlines()]
    assert texts == [document["text"] for document in documents("de_DE", 150)]


def test_the_index_points_at_the_members_of_the_tar(german: Path) -> None:
    for path in sorted((german / "de_DE").glob("*.tar")):
        index = json.loads(path.with_suffix(".json").read_text())
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            assert [member.offset_data for member in members] == index["offset"]
            assert [member.size for member in members] == index["size"]
            assert {member.mtime for member in members} == {0}


def test_the_manifest_describes_its_shards(german: Path) -> None:
    records = Corpus.open(german).records("de_DE")
    assert [record.chunks for record in records] == [4, 4, 2]
    assert sum(record.documents for record in records) == 150
    assert sum(record.characters for record in records) == sum(len(d["text"]) for d in documents("de_DE", 150))
    for record in records:
        data = (german / "de_DE" / record.shard).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (record.size, record.sha256)


def test_an_error_while_writing_leaves_the_published_shards_and_no_rest(german: Path) -> None:
    before = digests(german)
    with pytest.raises(KeyError), ShardWriter(german, "de_DE", "tests", "0", 4, 4) as writer:
        for document in documents("de_DE", 9):
            writer.write(document)
        raise KeyError
    assert digests(german) == before


def write_for_ever(folder: Path) -> None:
    while True:
        write_shards(folder, "de_DE", 150, chunk=2, shard=2)


def test_a_killed_writer_leaves_only_whole_shards_and_the_next_one_goes_on(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
    process.start()
    assert process.pid
    while not (tmp_path / "de_DE" / "manifest.jsonl").exists():
        process.join(0.05)
    process.join(0.2)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    corpus = Corpus.open(tmp_path)
    published = list(corpus.read("de_DE"))
    assert published
    write_shards(tmp_path, "de_DE", 10, chunk=2, shard=2)
    assert list(Corpus.open(tmp_path).read("de_DE")) == [*published, *documents("de_DE", 10)]
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_tar_without_a_manifest_line_does_not_count(german: Path) -> None:
    manifest = german / "de_DE" / "manifest.jsonl"
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text("".join(lines[:2]))
    assert Corpus.open(german).chunks("de_DE") == 8
    write_shards(german, "de_DE", 22)  # takes the place of the third tar
    assert Corpus.open(german).documents("de_DE") == 8 * 16 + 22
    assert len(list(Corpus.open(german).read("de_DE"))) == 8 * 16 + 22


def test_two_writers_of_one_language_are_refused(tmp_path: Path) -> None:
    with (
        ShardWriter(tmp_path, "de_DE", "tests", "0"),
        pytest.raises(ValueError, match="de_DE has another writer; give each language to one process"),
    ):
        ShardWriter(tmp_path, "de_DE", "tests", "0")


@pytest.mark.parametrize("document", [{}, {"text": ""}, {"text": None}, {"text": 3}, {"text": "half \ud800 a pair"}])
def test_a_document_that_is_none_is_refused(tmp_path: Path, document: dict[str, object]) -> None:
    with ShardWriter(tmp_path, "de_DE", "tests", "0") as writer:
        with pytest.raises(ValueError, match="de_DE, document 7: "):
            writer.write({**document, "id": 7})
        writer.write({"text": "the next one is written all the same"})
    assert Corpus.open(tmp_path).documents("de_DE") == 1


def test_an_unknown_language_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'de_DE'"):
        ShardWriter(tmp_path, "de", "tests", "0")


def test_a_missing_and_a_shortened_shard_are_named_together(german: Path) -> None:
    (german / "de_DE" / "de_DE-000000.tar").unlink()
    shortened = german / "de_DE" / "de_DE-000001.tar"
    size = shortened.stat().st_size
    os.truncate(shortened, size - 10_000)
    with pytest.raises(ValueError, match=r"de_DE-000000\.tar: missing.*\n.*de_DE-000001\.tar: ") as refused:
        Corpus.open(german)
    assert f"{size - 10_000} bytes, manifest.jsonl says {size}: it is cut short" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 2


@pytest.mark.parametrize("number", [0, 5, 9])
def test_one_flipped_bit_anywhere_in_a_chunk_is_one_clear_error(german: Path, number: int) -> None:
    shard, inside = divmod(number, 4)
    path = german / "de_DE" / f"de_DE-{shard:06d}.tar"
    index = json.loads(path.with_suffix(".json").read_text())
    data = bytearray(path.read_bytes())
    for position in (0, index["size"][inside] // 2, index["size"][inside] - 1):
        damaged = bytearray(data)
        damaged[index["offset"][inside] + position] ^= 1
        path.write_bytes(damaged)
        corpus = Corpus.open(german)
        with pytest.raises(ValueError, match=rf"{path.name}: chunk {number} of de_DE .* the shard is damaged"):
            corpus.read_chunk("de_DE", number)
        others = [i for i in range(10) if i != number]
        assert sum(len(corpus.read_chunk("de_DE", i)) for i in others) == 150 - (6 if number == 9 else 16)


def test_a_shard_cut_short_while_in_use_is_one_clear_error(german: Path) -> None:
    corpus = Corpus.open(german)
    path = german / "de_DE" / "de_DE-000002.tar"
    os.truncate(path, json.loads(path.with_suffix(".json").read_text())["offset"][1] + 5)
    with pytest.raises(ValueError, match=r"de_DE-000002\.tar: chunk 9 .* has 5 of \d+ bytes: it is cut short"):
        corpus.read_chunk("de_DE", 9)
    path.unlink()
    with pytest.raises(ValueError, match=r"de_DE-000002\.tar: No such file"):
        corpus.read_chunk("de_DE", 9)


def test_damage_to_index_or_manifest_is_one_clear_error(german: Path) -> None:
    index, manifest = german / "de_DE" / "de_DE-000000.json", german / "de_DE" / "manifest.jsonl"
    whole = index.read_bytes()
    for damaged in (b"", whole[:-20], b'{"offset": []}', whole.replace(b"[", b"[0,", 1)):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"de_DE-000000\.json: the index of de_DE-000000\.tar cannot be read"):
            Corpus.open(german).read_chunk("de_DE", 0)
    index.write_bytes(whole)
    line = manifest.read_text().splitlines()[0]
    for broken, message in [
        ("{", "manifest.jsonl, line 1: not a manifest line"),
        ("", "manifest.jsonl: empty"),
        (line.replace("de_DE-000000.tar", "../../secret.tar"), "'../../secret.tar' is no shard's name"),
    ]:
        manifest.write_text(broken)
        with pytest.raises(ValueError, match=message):
            Corpus.open(german)


def test_languages_and_folders_that_are_not_there_are_refused_by_name(tiny_corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no shards here .* python -m data_pipelines CONFIG"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no shards of language 'fr_XX'; there are ar_AR, .*\n.*did you mean 'de_DE'"):
        Corpus.open(tiny_corpus.folder, ["fr_XX", "de"])
    assert Corpus.open(tiny_corpus.folder, ["zh_CN", "de_DE"]).languages == ["de_DE", "zh_CN"]
    with pytest.raises(IndexError):
        tiny_corpus.read_chunk("de_DE", 10)


def test_a_corpus_pickles_and_moves(german: Path, tmp_path: Path) -> None:
    corpus = Corpus.open(german)
    corpus.read_chunk("de_DE", 0)
    assert pickle.loads(pickle.dumps(corpus)).read_chunk("de_DE", 9) == corpus.read_chunk("de_DE", 9)
    shutil.copytree(german, tmp_path / "elsewhere")
    assert Corpus.open(tmp_path / "elsewhere").fingerprint == corpus.fingerprint
