"""Records as servers and crawlers make them, right and wrong: none stops its archive, each says what became of it."""

import gzip
import re
import zlib

import brotli
import pytest

from data_pipelines.config import ExtractConfig
from data_pipelines.steps.extract import ExtractText
from tests.test_pipeline_steps import PAGES, archive, page, read, record

TEXT = "A good text that is long enough to be seen. " * 20
BODY = page(TEXT).encode()
TYPE = "Content-Type: text/html"
GZIP, CHUNKED = f"{TYPE}\r\nContent-Encoding: gzip", f"{TYPE}\r\nTransfer-Encoding: chunked"


def chunks(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:100], body[100:])) + b"0\r\n\r\n"


def raw_deflate() -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(BODY) + packer.flush()


def flipped(body: bytes) -> bytes:
    return body[:40] + bytes([body[40] ^ 0xFF, body[41] ^ 0xFF]) + body[42:]


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (GZIP, gzip.compress(BODY)),
        (GZIP, BODY),  # unpacked by the crawler, which kept the header
        (f"{CHUNKED}\r\nContent-Encoding: gzip", chunks(gzip.compress(BODY))),
        (f"{CHUNKED}\r\nContent-Encoding: gzip", chunks(BODY[:0]) + BODY),
        (f"{CHUNKED}\r\nContent-Encoding: gzip", gzip.compress(BODY)),
        (f"{CHUNKED}\r\nContent-Encoding: gzip", BODY),
        (CHUNKED, chunks(BODY)),
        (CHUNKED, BODY),
        (f"{TYPE}\r\nContent-Encoding: br", brotli.compress(BODY)),
        (f"{TYPE}\r\nContent-Encoding: deflate", zlib.compress(BODY)),
        (f"{TYPE}\r\nContent-Encoding: utf-8", BODY),  # nobody knows that one
        (f"{TYPE}; charset=klingon", BODY),
        (f'{TYPE}; charset="utf-8;\xff', BODY),
        (f"{TYPE}\r\nX-F\xfc: \xff\xfe", BODY),
        ("content-type: Text/HTML; Charset=UTF-16", BODY.decode().encode("utf-16")),
        (TYPE, BODY.decode().encode("utf-16")),
        (TYPE, b"\xef\xbb\xbf" + BODY),
    ],
)
def test_body_is_read_as_it_is_whatever_its_headers_say(head, body, tmp_path):
    path = archive(tmp_path / "a.warc.gz", [record("http://a.test/1", body, head), PAGES[0]])
    documents, found = read(path, tmp_path, max_faults=0)
    documents = list(ExtractText(ExtractConfig()).run(iter(documents)))
    if body.startswith(b"0\r\n"):  # the chunks are none
        assert documents[0].metadata["dropped"] == "empty"
    else:
        assert documents[0].text.split() == TEXT.split()
    assert documents[1].text
    assert found["records"] == {"response": 2}


@pytest.mark.parametrize(
    ("head", "body"),
    [
        (GZIP, flipped(gzip.compress(BODY))),
        (f"{TYPE}\r\nContent-Encoding: deflate", raw_deflate()),
        (CHUNKED, chunks(BODY)[:-60]),
        (CHUNKED, b"5\r\nhello\r\nzz\r\n" + BODY),
    ],
)
def test_body_that_cannot_be_unpacked_costs_its_page_and_no_fault_of_the_archive(head, body, tmp_path):
    path = archive(tmp_path / "a.warc.gz", [record("http://a.test/1", body, head), PAGES[0]])
    documents, found = read(path, tmp_path, max_faults=0)
    assert [d.metadata.get("dropped") for d in documents] == ["broken_body", None]
    assert documents[0].metadata["url"] == "http://a.test/1"
    assert found["records"] == {"response": 2}


def with_length(length: bytes) -> bytes:
    return re.sub(rb"Content-Length: \d+\r\n", length, record("http://a.test/1", BODY), count=1)


@pytest.mark.parametrize(
    "content",
    [
        with_length(b""),
        with_length(b"Content-Length: -5\r\n"),
        with_length(b"Content-Length: 99999999999999999999\r\n"),
        with_length(b"Content-Length: 3\r\nContent-Length: 900\r\n"),
        record("http://a.test/1", BODY).replace(b"\r\n", b"\n"),
        b"junk, no record\r\n",
    ],
)
def test_record_that_is_none_is_a_fault_and_the_next_one_is_read(content, tmp_path):
    documents, found = read(archive(tmp_path / "a.warc.gz", [content, PAGES[0]]), tmp_path, max_faults=1)
    assert [d.metadata["url"] for d in documents] == ["http://a.test/0"]
    assert len(found["faults"]) == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (record("http://a.test/1", b"\0" * 5000), "empty"),
        (record("http://a.test/1", b""), "empty"),
        (record("http://a.test/1", b"<html></html>"), "empty"),
        (record("http://a.test/1", BODY, status="2OO"), "not_ok"),
        (record("http://a.test/1", BODY, status=""), "not_ok"),
    ],
)
def test_page_that_is_none_is_dropped_and_the_next_one_is_read(content, reason, tmp_path):
    documents, _ = read(archive(tmp_path / "a.warc.gz", [content, PAGES[0]]), tmp_path, max_faults=0)
    documents = list(ExtractText(ExtractConfig()).run(iter(documents)))
    assert [d.metadata.get("dropped") for d in documents] == [reason, None]
