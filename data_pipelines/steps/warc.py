"""The records of a WARC archive, and every damaged place noticed.

Neither FastWARC nor warcio says that an archive was cut, and both lose the rest of a file after a broken
byte. So the compressed members are walked here, each checked against its checksum; after a broken one reading
goes on at the next member that holds a record.
"""

import mmap
import re
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal, NamedTuple

from fastwarc import ArchiveIterator, WarcRecord, WarcRecordType

from data_pipelines.steps.unpack import BROKEN, Codec, find_codec, find_dictionary

END = b"\r\n\r\n"  # of headers, and of a record
_CONTENT_LENGTH = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)
GZIP = b"\x1f\x8b"
_CHUNKED = re.compile(rb"^transfer-encoding:[^\r\n]*chunked", re.IGNORECASE | re.MULTILINE)
_GZIPPED = re.compile(rb"^content-encoding:[^\r\n]*gzip", re.IGNORECASE | re.MULTILINE)
_CHUNK = re.compile(rb"\s*[0-9a-f]{1,8}\s*[;\r\n]", re.IGNORECASE)
LARGEST_BLOCK = 1 << 22  # bytes after which every codec has given its first ones: lz4 waits for a block
MAX_MEMBER = 1 << 28  # bytes of one gzip member, unpacked; a WARC has one record in each


class Member(NamedTuple):
    """A compressed member: where it starts and ends in the archive, and its content or what is wrong with it."""

    start: int
    end: int
    content: bytes | mmap.mmap
    fault: str | None


def records(archive: str) -> Iterator[tuple[int, WarcRecord | str]]:
    """(offset, record) of an archive, or (offset, what is wrong) of a damaged place."""
    size = Path(archive).stat().st_size
    if size == 0:
        yield 0, "the file is empty"
        return
    with Path(archive).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield from records_in(data)


def records_in(data: bytes | mmap.mmap) -> Iterator[tuple[int, WarcRecord | str]]:
    """The same of an archive's bytes, or of a stretch of them."""
    try:
        codec, start = find_dictionary(data) or (find_codec(data[:8]), 0)
    except BROKEN as error:
        yield 0, f"a broken dictionary ({error}): nothing can be read without it"
        return
    # Uncompressed, the archive is one stretch of bytes and an offset counts from its start.
    stretches = members(data, codec, start) if codec else [Member(0, len(data), data, None)]
    for member in stretches:
        if member.fault:
            yield member.start, member.fault
            continue
        for start, found in parse(member.content):
            yield start if member.content is data else member.start, found


def parse(content: bytes | mmap.mmap) -> Iterator[tuple[int, WarcRecord | str]]:
    """(offset, record) of uncompressed WARC bytes, or (offset, what is wrong) where one does not fit."""
    start = 0
    while start < len(content):
        body = content.find(END, start) + len(END)
        length = _CONTENT_LENGTH.search(content[start:body])
        end = body + int(length.group(1)) if length and body > start else -1
        # After its block a record ends with two empty lines; where it does not, its length is wrong.
        if content[start : start + 5] == b"WARC/" and content[end : end + len(END)] == END:
            yield start, _record(bytes(content[start : end + len(END)]))
            start = end + len(END)
            continue
        there = len(content) - start
        after = content.find(END + b"WARC/", start)
        start_after = len(content) if after == -1 else after + len(END)
        what = f"{there} bytes at the end that are no whole record: it is cut short"
        if after != -1:
            what = f"{start_after - start} bytes that are no record, or not as long as it says"
        yield start, what
        start = start_after


def _record(content: bytes) -> WarcRecord | str:
    """The one record in these bytes, its HTTP headers read and its body to be unpacked; or what is wrong."""
    try:
        record = _parsed(content)
        if record.record_type in (WarcRecordType.response, WarcRecordType.request) and record.is_http:
            try:
                record.parse_http(auto_decode=_encodings(content))
            except (
                OSError,
                ValueError,
                RuntimeError,
            ):  # an encoding that nobody knows, such as utf-8: a server's mistake, no damage
                record = _parsed(content)
                record.parse_http(auto_decode="none")
    except (StopIteration, OSError, ValueError, RuntimeError) as error:
        return f"a record whose headers cannot be read ({error})"
    return record


def _parsed(content: bytes) -> WarcRecord:
    return next(iter(ArchiveIterator(BytesIO(content), parse_http=False, stream_detect=False)))


def _encodings(content: bytes) -> Literal["none", "content", "all"]:
    """Which encodings of an HTTP body are to be undone: not those that its headers name and its bytes do not have.

    Crawlers that unpack bodies keep the headers at times.
    """
    start = content.find(END) + len(END)
    body = content.find(END, start) + len(END)
    head = content[start:body]
    chunked = bool(_CHUNKED.search(head))
    plain = chunked and not _CHUNK.match(content[body : body + 32])
    if (plain or not chunked) and _GZIPPED.search(head) and content[body : body + 2] != GZIP:
        return "none"
    return "content" if plain else "all"


def members(data: bytes | mmap.mmap, codec: Codec, start: int = 0) -> Iterator[Member]:
    """The compressed members from `start`; a broken one comes with its fault and reaches to the next with a record."""
    while start < len(data):
        member = _member(data, start, codec)
        if member.fault:
            end = data.find(codec.magic, start + 1)
            while end != -1 and not _holds_record(data, end, codec):
                end = data.find(codec.magic, end + 1)
            member = member._replace(end=len(data) if end == -1 else end)
        yield member
        start = member.end


def _member(data: bytes | mmap.mmap, start: int, codec: Codec) -> Member:
    unpack = codec.start()
    parts: list[bytes] = []
    size, position = 0, start
    try:
        while not unpack.eof:
            block = data[position : position + codec.block]
            if not block:
                return Member(start, len(data), b"", "the archive ends inside a record: it is cut short")
            position += len(block)
            parts.append(unpack.decompress(block))
            size += len(parts[-1])
            if size > MAX_MEMBER:
                return Member(start, len(data), b"", f"a {codec.name} member of more than {MAX_MEMBER} bytes")
    except BROKEN as error:
        return Member(start, len(data), b"", f"a broken {codec.name} member ({error})")
    return Member(start, position - len(unpack.unused_data or b""), b"".join(parts), None)


def _holds_record(data: bytes | mmap.mmap, start: int, codec: Codec) -> bool:
    """Whether a record starts here, or the few bytes of the magic stand here by chance."""
    unpack, head = codec.start(), b""
    try:
        for position in range(start, min(start + LARGEST_BLOCK, len(data)), 4096):
            head += unpack.decompress(data[position : position + 4096])
            if unpack.eof or len(head) >= 5:
                break
    except BROKEN:
        return False
    return head.startswith(b"WARC/")
