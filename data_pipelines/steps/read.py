"""Read: WARC archives to documents, and every damaged place noticed.

Neither FastWARC nor warcio says that an archive was cut, and both lose the rest of a file after a broken
byte. So the gzip members are walked here, each checked against its CRC; after a broken one reading goes on at
the next member that holds a record.
"""

import mmap
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from fastwarc import ArchiveIterator, WarcRecord, WarcRecordType

from data_pipelines.children import die_with_pool
from data_pipelines.progress import Heartbeat
from data_pipelines.steps.document import document_id, drop, write_lines

GZIP = b"\x1f\x8b\x08"
END = b"\r\n\r\n"  # of headers, and of a record
_CONTENT_LENGTH = re.compile(rb"^content-length:\s*(\d+)\s*$", re.IGNORECASE | re.MULTILINE)
BLOCK = 1 << 16  # bytes handed to zlib at once
MAX_MEMBER = 1 << 28  # bytes of one gzip member, unpacked; a WARC has one record in each
HTML_TYPES = {"text/html", "application/xhtml+xml", "text/plain", ""}


class Member(NamedTuple):
    """A gzip member: where it starts and ends in the archive, and its content or what is wrong with it."""

    start: int
    end: int
    content: bytes | mmap.mmap
    fault: str | None


class DamagedArchiveError(ValueError):
    """An archive with more damaged places than the recipe allows."""


class ReadArchives(PipelineStep):
    """Yields a document per response record of this task's archives; its bytes are in metadata["payload"].

    What was found in each archive (records by type, damaged places) is written to `folder`/<task>.jsonl.
    """

    type, name = "xlscale", "read"

    def __init__(self, archives: list[str], max_faults: int, max_page_bytes: int, folder: Path, heartbeat: Path):
        super().__init__()
        self.archives, self.max_faults, self.max_page_bytes = archives, max_faults, max_page_bytes
        self.folder, self.heartbeat = folder, heartbeat

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        die_with_pool()
        rows = []
        for archive in self.archives[rank::world_size]:
            heartbeat = Heartbeat(self.heartbeat / f"read-{rank:05d}", Path(archive).stat().st_size)
            row: dict[str, Any] = {"archive": archive, "bytes": Path(archive).stat().st_size}
            records: Counter[str] = Counter()
            faults: list[dict[str, Any]] = []
            for record, offset in self.records(archive, faults):
                records[str(record.record_type)] += 1
                heartbeat.beat(offset)
                if record.record_type == WarcRecordType.response and record.is_http:
                    with self.track_time():
                        document = self.document(record, archive, offset)
                    yield document
            heartbeat.beat(heartbeat.total)
            rows.append(row | {"records": dict(sorted(records.items())), "faults": faults})
        write_lines(self.folder / f"{rank:05d}.jsonl", rows)

    def records(self, archive: str, faults: list[dict[str, Any]]) -> Iterator[tuple[WarcRecord, int]]:
        """The readable records of an archive with their offsets; damaged places are appended to `faults`."""

        def fault(offset: int, what: str) -> None:
            faults.append({"offset": offset, "fault": what})
            if len(faults) > self.max_faults:
                places = "; ".join(f"byte {f['offset']}: {f['fault']}" for f in faults)
                raise DamagedArchiveError(
                    f"{archive} has {len(faults)} damaged places, over read.max_faults = {self.max_faults} "
                    f"({places}); fetch the archive anew, leave it out or raise read.max_faults"
                )

        size = Path(archive).stat().st_size
        if size == 0:
            fault(0, "the file is empty")
            return
        with Path(archive).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            # Uncompressed, the archive is one stretch of bytes and an offset counts from its start.
            stretches = members(data) if data[:3] == GZIP else [Member(0, size, data, None)]
            for member in stretches:
                if member.fault:
                    fault(member.start, member.fault)
                    continue
                for start, found in parse(member.content):
                    offset = start if member.content is data else member.start
                    if isinstance(found, str):
                        fault(offset, found)
                    else:
                        yield found, offset

    def document(self, record: WarcRecord, archive: str, offset: int) -> Document:
        """A response record as a document, marked as dropped if it is no page."""
        url = (record.headers.get("WARC-Target-URI") or "").strip("<>")
        status, kind = record.http_headers.status_code, (record.http_content_type or "").strip().lower()
        payload = record.reader.read(self.max_page_bytes + 1)
        metadata = {"url": url, "archive": Path(archive).name, "offset": offset, "payload": payload}
        metadata["charset"] = record.http_charset or ""
        document = Document(text="", id=document_id(url, payload), metadata=metadata)
        if status != 200:
            drop(document, "not_ok")
        elif kind not in HTML_TYPES:
            drop(document, "not_html")
        elif len(payload) > self.max_page_bytes:
            drop(document, "too_large")
        return document


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
        record = next(iter(ArchiveIterator(BytesIO(content), parse_http=False, stream_detect=False)))
        if record.record_type in (WarcRecordType.response, WarcRecordType.request) and record.is_http:
            record.parse_http(auto_decode="all")
    except (StopIteration, OSError, ValueError, RuntimeError) as error:
        return f"a record whose headers cannot be read ({error})"
    return record


def members(data: mmap.mmap) -> Iterator[Member]:
    """The gzip members; a broken one comes with its fault and reaches to the next that holds a record."""
    start = 0
    while start < len(data):
        member = _member(data, start)
        if member.fault:
            end = data.find(GZIP, start + 1)
            while end != -1 and not _holds_record(data, end):
                end = data.find(GZIP, end + 1)
            member = member._replace(end=len(data) if end == -1 else end)
        yield member
        start = member.end


def _member(data: mmap.mmap, start: int) -> Member:
    inflate = zlib.decompressobj(wbits=31)
    parts: list[bytes] = []
    size, position = 0, start
    try:
        while not inflate.eof:
            if not inflate.unconsumed_tail:
                block = data[position : position + BLOCK]
                if not block:
                    return Member(start, len(data), b"", "the archive ends inside a record: it is cut short")
                position += len(block)
            parts.append(inflate.decompress(inflate.unconsumed_tail or block, 1 << 22))
            size += len(parts[-1])
            if size > MAX_MEMBER:
                return Member(start, len(data), b"", f"a gzip member of more than {MAX_MEMBER} bytes")
    except zlib.error as error:
        return Member(start, len(data), b"", f"a broken gzip member ({error})")
    return Member(start, position - len(inflate.unused_data), b"".join(parts), None)


def _holds_record(data: mmap.mmap, start: int) -> bool:
    """Whether a record starts here, or the three bytes stand here by chance."""
    try:
        return zlib.decompressobj(wbits=31).decompress(data[start : start + 4096], 5) == b"WARC/"
    except zlib.error:
        return False
