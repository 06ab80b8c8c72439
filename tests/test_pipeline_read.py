"""data_pipelines: what may come in, whole or broken: WET, nasty records."""

import gzip
import json
import random
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import pytest
import zstandard

from data_pipelines.config import ExtractConfig, IdentifyConfig, ReadConfig
from data_pipelines.steps.extract import ExtractText
from data_pipelines.steps.identify import IdentifyLanguage
from tests.test_pipeline_steps import PAGES, archive, declarations, page, read, record


def conversion(url: str, text: bytes) -> bytes:
    """A record of a WET file, as CommonCrawl writes them."""
    warc = f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: {url}\r\nWARC-Identified-Content-Language: fra\r\n"
    return f"{warc}Content-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text + b"\r\n\r\n"


def extracted(path: Path, tmp_path: Path, **settings: int):
    """The documents of an archive as they leave the extraction."""
    return list(ExtractText(ExtractConfig()).run(iter(read(path, tmp_path, **settings)[0])))


def test_wet_and_warc_of_the_same_pages_give_the_same_text_and_language(tmp_path):
    names = ("deu_1996", "fra", "rus", "jpn", "arb")
    texts = {f"http://{name}.test/": declarations()[name][0] for name in names}
    pages = archive(tmp_path / "a.warc.gz", [record(url, page(text).encode()) for url, text in texts.items()])
    info = (
        b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Type: application/warc-fields\r\nContent-Length: 0\r\n\r\n\r\n\r\n"
    )
    wet = [info, *(conversion(url, text.encode()) for url, text in texts.items())]
    found = {}
    for path in (pages, archive(tmp_path / "a.warc.wet.gz", wet)):
        documents = IdentifyLanguage(IdentifyConfig()).run(iter(extracted(path, tmp_path)))
        found[path] = [(d.metadata["url"], d.metadata["language"], d.text.split()) for d in documents]
    assert found[pages] == found[tmp_path / "a.warc.wet.gz"]
    assert [language for _, language, _ in found[pages]] == ["de_DE", "fr_XX", "ru_RU", "ja_XX", "ar_AR"]


def test_wet_record_without_text_too_long_or_not_in_utf8_is_read_as_that(tmp_path):
    texts = [b" \r\n", b"x" * 2000, "Déclaration".encode("latin-1") + b" of text", b"plain  text\r\nhere"]
    path = archive(tmp_path / "a.warc.wet.gz", [conversion(f"http://a.test/{i}", t) for i, t in enumerate(texts)])
    documents = extracted(path, tmp_path, max_page_bytes=1500)
    assert [d.metadata.get("dropped") for d in documents] == ["empty", "too_large", None, None]
    assert [d.text for d in documents[2:]] == ["D\ufffdclaration of text", "plain text\nhere"]
    assert all("payload" not in d.metadata for d in documents)


def test_cut_wet_file_is_noticed(tmp_path):
    whole = archive(tmp_path / "a.warc.wet.gz", [conversion(f"http://a.test/{i}", b"text") for i in range(9)])
    whole.write_bytes(whole.read_bytes()[:-9])
    documents, found = read(whole, tmp_path)
    assert (len(documents), found["records"], len(found["faults"])) == (8, {"conversion": 8}, 1)


@pytest.mark.parametrize(
    ("name", "charset", "language"),
    [("fra", "latin-1", "fr_XX"), ("jpn", "shift_jis", "ja_XX"), ("cmn_hans", "gb18030", "zh_CN")],
)
def test_page_in_an_old_charset_comes_out_as_its_language(name, charset, language, tmp_path):
    text = declarations()[name][0][:4000].encode(charset, "ignore").decode(charset)
    path = archive(tmp_path / "a.warc.gz", [record("http://a.test/", page(text).encode(charset))])  # not declared
    (found,) = IdentifyLanguage(IdentifyConfig()).run(iter(extracted(path, tmp_path)))
    assert found.metadata["language"] == language
    assert found.text.split() == text.split()


def test_page_of_5_megabytes_is_read_whole(tmp_path):
    line = "A line of a very long page, and here is its number: "
    text = "\n".join(f"{line}{i}." for i in range(5_000_000 // 64))
    body = page(text).encode()
    assert 5e6 < len(body) < 6e6
    path = archive(tmp_path / "a.warc.gz", [record("http://a.test/long", body)])
    (found,) = extracted(path, tmp_path, max_page_bytes=ReadConfig(archives=[]).max_page_bytes)
    assert found.text.split() == text.split()


def bomb(gigabytes: int) -> bytes:
    """The start of a gzip stream of so many gigabytes of spaces; its end is missing, nobody should get there."""
    packer = zlib.compressobj(9, wbits=31)
    head = packer.compress(b" " * (1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
    again = packer.compress(b" " * (1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)  # does not refer to what was before
    return head + again * (gigabytes * 64 - 1)


def test_pages_and_records_that_unpack_to_gigabytes_take_little_memory_and_the_next_is_read(tmp_path):
    packed = record("http://a.test/1", bomb(4), "Content-Type: text/html\r\nContent-Encoding: gzip")
    path = tmp_path / "a.warc.gz"
    # The first is a page packed twice, the second a record whose gzip member has no end.
    path.write_bytes(gzip.compress(packed, mtime=0) + bomb(4) + gzip.compress(PAGES[0], mtime=0))
    code = (
        "import json, sys; from pathlib import Path; from tests.test_pipeline_read import read\n"
        "documents, found = read(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        # Not getrusage(): its maximum is inherited from the process that started this one.
        "peak = int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])\n"
        "print(json.dumps([[d.metadata.get('dropped') for d in documents], found['faults'], peak]))"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path)], capture_output=True, text=True)
    dropped, faults, peak = json.loads(run.stdout)
    assert dropped == ["too_large", None]
    assert [fault["fault"] for fault in faults] == ["a gzip member of more than 268435456 bytes"]
    assert peak < 600_000, run.stderr  # KiB


def test_url_with_control_characters_is_written_without_them(tmp_path):
    url = "http://a.test/\x1b[31mred\tand\x00zero\x85 a\u2028b"
    (found,) = read(archive(tmp_path / "a.warc.gz", [record(url, b"x")]), tmp_path)[0]
    assert found.metadata["url"] == "http://a.test/%1B[31mred%09and%00zero%C2%85%20a%E2%80%A8b"
    (again,) = read(archive(tmp_path / "b.warc.gz", [record("http://a.test/ü?a=%20b", b"x")]), tmp_path)[0]
    assert again.metadata["url"] == "http://a.test/ü?a=%20b"


@pytest.mark.parametrize("url", ["", "not a url", "http://[::1", "http://a.test/" + "x" * 5000])
def test_odd_address_is_no_fault(url, tmp_path):
    documents, found = read(archive(tmp_path / "a.warc.gz", [record(url, b"x"), PAGES[0]]), tmp_path)
    assert (len(documents), found["faults"]) == (2, [])


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_checksum=True).compress(content)


def lz4(content: bytes) -> bytes:
    return pytest.importorskip("lz4.frame").compress(content, content_checksum=True)


# Longer than a block of lz4 even when packed, so that a record shows only after many bytes.
LONG = [record(f"http://a.test/{i}", random.Random(i).randbytes(150_000).hex().encode()) for i in range(6)]


@pytest.mark.parametrize("pack", [gzip.compress, zstd, lz4])
def test_archive_of_any_compression_is_read_and_a_flipped_byte_costs_one_record(pack, tmp_path):
    packed = [pack(one) for one in LONG]
    path = tmp_path / "packed.warc"
    path.write_bytes(b"".join(packed))
    documents, found = read(path, tmp_path, max_faults=0)
    assert [d.metadata["url"][-1] for d in documents] == list("012345")
    starts = [sum(map(len, packed[:i])) for i in range(6)]
    assert [d.metadata["offset"] for d in documents] == starts
    content = bytearray(path.read_bytes())
    content[starts[2] + len(packed[2]) // 2] ^= 0x10
    path.write_bytes(content)
    documents, found = read(path, tmp_path)
    assert [d.metadata["url"][-1] for d in documents] == list("01345")
    assert [fault["offset"] for fault in found["faults"]] == [starts[2]]
    path.write_bytes(b"".join(packed)[: starts[3] + 1000])
    documents, found = read(path, tmp_path)
    assert len(documents) == 3
    assert [fault["fault"] for fault in found["faults"]] == ["the archive ends inside a record: it is cut short"]


@pytest.mark.parametrize("pack", [zstd, lz4])
def test_packed_record_of_gigabytes_is_damage_and_not_memory(pack, tmp_path):
    path = tmp_path / "packed.warc"
    path.write_bytes(pack(bytes(1 << 29)) + pack(PAGES[0]))
    tracemalloc.start()
    documents, found = read(path, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(documents) == 1
    assert "member of more than 268435456 bytes" in found["faults"][0]["fault"]
    assert peak < 400 << 20


@pytest.mark.parametrize("packed", [False, True])
def test_archive_with_a_dictionary_of_its_own_is_read_and_its_damage_noticed(packed, tmp_path):
    dictionary = zstandard.train_dictionary(8192, [one[i : i + 200] for one in PAGES for i in range(0, 400, 10)])
    packer = zstandard.ZstdCompressor(dict_data=dictionary, write_checksum=True)
    content = zstd(dictionary.as_bytes()) if packed else dictionary.as_bytes()
    head = b"\x5d\x2a\x4d\x18" + len(content).to_bytes(4, "little") + content
    frames = [packer.compress(one) for one in PAGES]
    assert sum(map(len, frames)) < sum(len(zstd(one)) for one in PAGES)
    path = tmp_path / "a.warc.zst"
    path.write_bytes(head + b"".join(frames))
    documents, found = read(path, tmp_path, max_faults=0)
    assert [d.metadata["url"] for d in documents] == [f"http://a.test/{i}" for i in range(10)]
    assert [d.metadata["offset"] for d in documents][:2] == [len(head), len(head) + len(frames[0])]
    flipped = bytearray(path.read_bytes())
    flipped[len(head) + len(frames[0]) + 30] ^= 0x10
    path.write_bytes(flipped)
    documents, found = read(path, tmp_path)
    assert [d.metadata["url"][-1] for d in documents] == list("023456789")
    assert [fault["offset"] for fault in found["faults"]] == [len(head) + len(frames[0])]
    for broken in (head[:50], head[:8] + b"x" * len(content) + b"".join(frames)):
        path.write_bytes(broken)
        documents, found = read(path, tmp_path)
        assert documents == []
        assert "broken dictionary" in found["faults"][0]["fault"]
