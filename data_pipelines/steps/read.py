"""Read: archives to documents; what is damaged in them is counted, and an archive beyond its budget is left out."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep
from fastwarc import WarcRecord, WarcRecordType

from data_pipelines.config import ReadConfig
from data_pipelines.progress import Heartbeat
from data_pipelines.steps.corpora import kind_of, language_of_path, rows
from data_pipelines.steps.document import document_id, drop, write_lines
from data_pipelines.steps.fetch import at_hand
from data_pipelines.steps.index import Found, Place, indexed
from data_pipelines.steps.warc import records
from xlscale.data.remote import is_url
from xlscale.data.shards import file_sha256
from xlscale.languages import from_iso

HTML_TYPES = {"text/html", "application/xhtml+xml", "text/plain", ""}
_NOT_IN_URLS = re.compile(r"[\s\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class DamagedArchiveError(ValueError):
    """An archive with more damaged places than the recipe allows."""


class ReadArchives(PipelineStep):
    """Yields a document per page of this task's archives.

    The bytes of a response record are in metadata["payload"]; a conversion record (WET) and a corpus have text.
    What was found in each archive (records by type, damaged places) is written to `folder`/<task>.jsonl. One with too
    many of these is left at that place and noted as bad: CollectDocuments drops the documents that came before, known
    by metadata["source"], the number of their archive.
    """

    type, name = "xlscale", "read"

    def __init__(self, archives: list[str], config: ReadConfig, folder: Path, heartbeat: Path):
        super().__init__()
        self.archives, self.config, self.folder, self.heartbeat = archives, config, folder, heartbeat

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        found, total = list[dict[str, Any]](), len(self.archives)
        # Side by side, so that documents come in the order of the archives however many a task has.
        for number in range(total * rank // world_size, total * (rank + 1) // world_size):
            archive = self.archives[number]
            with at_hand(archive, self.folder / "fetched", self.config.attempts) as path:
                size = path.stat().st_size
                heartbeat = Heartbeat(self.heartbeat / f"read-{rank:05d}", size, sum(row["bytes"] for row in found))
                row: dict[str, Any] = {
                    "archive": archive, "source": number, "bytes": size, "records": {}, "faults": [], "bad": ""
                }  # fmt: skip
                if is_url(archive):
                    row["sha256"] = file_sha256(path)
                try:
                    for document in self.archive(archive, path, row, heartbeat):
                        document.metadata["source"] = number
                        yield document
                except DamagedArchiveError as error:
                    row["bad"] = str(error)
                row["records"] = dict(sorted(row["records"].items()))
                heartbeat.beat(size)
            found.append(row)
        write_lines(self.folder / f"{rank:05d}.jsonl", found)

    def archive(self, name: str, path: Path, row: dict[str, Any], heartbeat: Heartbeat) -> Iterator[Document]:
        """The documents of an archive that lies at `path`; what is found there is added to `row`."""
        kind, language = kind_of(name, self.config), None
        if self.config.language_from == "path":
            language = language_of_path(name)
        if kind == "warc":
            documents = self.pages((Found(Place(name, at, 0), found, at) for at, found in records(str(path))), row)
        elif kind == "index":
            documents = self.pages(indexed(str(path), self.config), row)
        else:
            documents = self.texts(name, path, kind, row)
        while True:
            with self.track_time():
                document, done = next(documents, (None, 0))
            if document is None:
                break
            if language:
                document.metadata["language"] = language
            heartbeat.beat(done)
            yield document

    def fault(self, row: dict[str, Any], offset: int, what: str) -> None:
        """Count a damaged place; DamagedArchiveError if there are too many."""
        faults = row["faults"]
        faults.append({"offset": offset, "fault": what})
        if len(faults) > self.config.max_faults:
            places = "; ".join(f"byte {f['offset']}: {f['fault']}" for f in faults)
            raise DamagedArchiveError(
                f"{row['archive']} has {len(faults)} damaged places, over read.max_faults = {self.config.max_faults} "
                f"({places}); fetch the archive anew, leave it out or raise read.max_faults"
            )

    def pages(self, found: Iterator[Found], row: dict[str, Any]) -> Iterator[tuple[Document, int]]:
        """The pages of WARC or WET records, each with how far the file is read."""
        for (archive, offset, _), record, done in found:
            if isinstance(record, str):
                where = "" if archive == row["archive"] else f"{archive}, byte {offset}: "
                self.fault(row, done, f"{where}{record}")
                continue
            kind = str(record.record_type)
            row["records"][kind] = row["records"].get(kind, 0) + 1
            if record.record_type == WarcRecordType.response and record.is_http:
                yield self.page(record, archive, offset), done
            elif record.record_type == WarcRecordType.conversion:
                url, payload = self._content(record)
                yield self.text(url, payload, archive, offset), done

    def texts(self, archive: str, path: Path, kind: str, row: dict[str, Any]) -> Iterator[tuple[Document, int]]:
        """The documents of a corpus, each with how much of the file is read up to it."""
        row["records"], cfg, done = {kind: 0}, self.config, 0
        for found in rows(str(path), kind, cfg):
            if isinstance(found, str):
                self.fault(row, done, found)
                continue
            done, text = found.done, field(found.fields, cfg.text_field)
            if not isinstance(text, str):
                there = ", ".join(found.fields)
                self.fault(row, done, f"document {found.number} has no text {cfg.text_field!r}, it has {there}: "
                           f"set read.text_field")  # fmt: skip
                continue
            row["records"][kind] += 1
            url = str(field(found.fields, cfg.url_field) or "")
            document = self.text(clean_url(url), text.encode("utf-8", "replace"), archive, found.number)
            if cfg.language_from == "field":
                said = str(field(found.fields, cfg.language_field) or "")
                if code := from_iso(said):
                    document.metadata["language"] = code
                else:
                    drop(document, "language_unsupported")
            yield document, done

    def page(self, record: WarcRecord, archive: str, offset: int) -> Document:
        """A response record as a document, marked as dropped if it is no page."""
        status, kind = record.http_headers.status_code, (record.http_content_type or "").strip().lower()
        try:
            (url, payload), broken = self._content(record), False
        except (OSError, ValueError, RuntimeError):  # what FastWARC raises at a body that is not as encoded as it says
            url, payload, broken = self._url(record), b"", True
        metadata = {"url": url, "archive": Path(archive).name, "offset": offset, "payload": payload}
        metadata["charset"] = record.http_charset or ""
        metadata["robots"] = "\n".join(v for k, v in record.http_headers.items() if k.lower() == "x-robots-tag")
        document = Document(text="", id=document_id(url, payload), metadata=metadata)
        if status != 200:
            drop(document, "not_ok")
        elif kind not in HTML_TYPES:
            drop(document, "not_html")
        elif len(payload) > self.config.max_page_bytes:
            drop(document, "too_large")
        elif broken:
            drop(document, "broken_body")
        return document

    def text(self, url: str, content: bytes, archive: str, offset: int) -> Document:
        """A document whose text others have extracted: UTF-8, or U+FFFD where it is not."""
        metadata = {"url": url, "archive": Path(archive).name, "offset": offset}
        document = Document(text="", id=document_id(url, content), metadata=metadata)
        if len(content) > self.config.max_page_bytes:
            drop(document, "too_large")
        else:
            document.text = content.decode("utf-8", "replace")
        return document

    def _content(self, record: WarcRecord) -> tuple[str, bytes]:
        """Address and body of a record; of a body that is too large a byte more than is allowed."""
        return self._url(record), record.reader.read(self.config.max_page_bytes + 1)

    def _url(self, record: WarcRecord) -> str:
        return clean_url((record.headers.get("WARC-Target-URI") or "").strip("<>"))


def field(fields: dict[str, Any], name: str) -> Any:
    """A field by its name, or by the path a.b to it; None if it is not there."""
    if name in fields:
        return fields[name]
    head, _, rest = name.partition(".")
    inner = fields.get(head)
    return field(inner, rest) if rest and isinstance(inner, dict) else None


def clean_url(url: str) -> str:
    """The address with spaces and control characters written as %20 and the like: it goes to terminals and tables."""
    return _NOT_IN_URLS.sub(lambda found: quote(found[0].encode("utf-8", "replace")), url.strip())
