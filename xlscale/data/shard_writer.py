"""Writes text shards (shards.py says what they are), each published whole or not at all."""

import fcntl
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import google_crc32c
import numpy as np
import zstandard

from xlscale.data.manifest import MANIFEST, Index, ShardRecord, manifest_bytes
from xlscale.data.members import MAX_CHUNK, TAR_BLOCK
from xlscale.data.shards import file_sha256, read_manifest, write_atomically
from xlscale.languages import language_id

COMPRESSIONS = {"none": "jsonl", "zstd": "jsonl.zst"}
"""What the `compression` of a ShardWriter may be, and the format and suffix of its members."""


class _Chunk(NamedTuple):
    offset: int
    size: int
    documents: int
    crc32c: int


class ShardWriter:
    """Writes the documents of one language into shards.

    Going on in a folder that holds shards adds to them. Same documents in, same bytes out. Only one writer
    per language: ValueError when another one holds the folder. A chunk has `documents_per_chunk` documents, or
    fewer if these are longer than MAX_CHUNK bytes.
    """

    def __init__(
        self,
        folder: str | Path,
        language: str,
        source: str,
        config_hash: str,
        documents_per_chunk: int = 128,
        chunks_per_shard: int = 64,
        compression: str = "none",
    ):
        language_id(language)
        if documents_per_chunk < 1 or chunks_per_shard < 1:
            raise ValueError(f"{documents_per_chunk=} and {chunks_per_shard=} must both be at least 1")
        if compression not in COMPRESSIONS:
            raise ValueError(f"{compression=} must be one of {', '.join(COMPRESSIONS)}")
        self.folder = Path(folder) / language
        self.language, self.source, self.config_hash = language, source, config_hash
        self.documents_per_chunk, self.chunks_per_shard = documents_per_chunk, chunks_per_shard
        self.format = COMPRESSIONS[compression]
        self._zstd = zstandard.ZstdCompressor(level=3)  # one thread: the same bytes at every run
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(self.folder)
        self.records = read_manifest(self.folder)
        self._lines: list[bytes] = []
        self._chunks: list[_Chunk] = []
        self._line_bytes = self._characters = self._bytes = 0
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def write(self, document: dict[str, Any]) -> None:
        """Add a document: `text`, not empty, and whatever describes it (`id`, `url`, ...)."""
        text, where = document.get("text"), f"{self.language}, document {document.get('id', 'without id')}"
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}: `text` must be a string that is not empty, got {text!r}")
        try:
            text_bytes = len(text.encode("utf-8"))
            line = json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":")).encode("utf-8")
        except UnicodeEncodeError:
            rule = "holds half a surrogate pair, which has no UTF-8 form; decode the page with errors='replace'"
            raise ValueError(f"{where}: {rule}") from None
        if len(line) >= MAX_CHUNK:
            raise ValueError(f"{where}: {len(line)} bytes must be below {MAX_CHUNK}; drop it or divide it")
        if self._line_bytes + len(line) >= MAX_CHUNK:
            self._end_chunk()
        self._lines.append(line)
        self._line_bytes += len(line) + 1
        self._characters, self._bytes = self._characters + len(text), self._bytes + text_bytes
        if len(self._lines) == self.documents_per_chunk:
            self._end_chunk()

    def close(self) -> None:
        """Publish what is left and let the folder go."""
        if self._lines:
            self._end_chunk()
        if self._chunks:
            self._publish()
        self._lock.close()

    def _abandon(self) -> None:
        """After an error the shard in work leaves nothing; those published before it stay."""
        if self._file is not None:
            self._tar.close()
            self._file.close()
            Path(self._file.name).unlink(missing_ok=True)
        self._lock.close()

    def _end_chunk(self) -> None:
        if self._file is None:
            # Imported here: webdataset imports torch, and readers of shards need neither.
            from webdataset.writer import TarWriter

            self._file = (self.folder / f".{self._name}.tar.tmp").open("wb")
            self._tar = TarWriter(self._file, encoder=False, mtime=0)
        data = b"\n".join(self._lines) + b"\n"
        if self.format == "jsonl.zst":
            data = self._zstd.compress(data)
        number = sum(record.chunks for record in self.records) + len(self._chunks)
        offset = self._tar.tarstream.offset + TAR_BLOCK  # names are short, so every header is one block
        self._tar.write({"__key__": f"{number:08d}", self.format: data})
        self._chunks.append(_Chunk(offset, len(data), len(self._lines), google_crc32c.value(data)))
        self._lines, self._line_bytes = [], 0
        if len(self._chunks) == self.chunks_per_shard:
            self._publish()

    @property
    def _name(self) -> str:
        return f"{self.language}-{len(self.records):06d}"

    def _publish(self) -> None:
        """Tar, then index, then the manifest line that makes them count: each durable before the next."""
        assert self._file is not None
        self._tar.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        beside, final = Path(self._file.name), self.folder / f"{self._name}.tar"
        digest = file_sha256(beside)
        beside.replace(final)
        index = Index(*np.array(self._chunks, dtype=np.int64).T).to_bytes()
        record = ShardRecord(
            shard=final.name,
            language=self.language,
            size=final.stat().st_size,
            sha256=digest,
            index_sha256=hashlib.sha256(index).hexdigest(),
            format=self.format,
            documents=sum(chunk.documents for chunk in self._chunks),
            chunks=len(self._chunks),
            characters=self._characters,
            bytes=self._bytes,
            source=self.source,
            config_hash=self.config_hash,
            text_field="text",
            faults={},
        )
        write_atomically(self.folder / record.index_name, index)
        self.records.append(record)
        write_atomically(self.folder / MANIFEST, manifest_bytes(self.records))
        self._file, self._chunks, self._characters, self._bytes = None, [], 0, 0


def join_shards(parts: list[Path], folder: Path) -> None:
    """One new folder of the shards of a language in several, in their order, numbered anew; the same files under
    other names.
    """
    folder.mkdir(parents=True)
    records = list[ShardRecord]()
    for part in parts:
        for record in read_manifest(part):
            renamed = record._replace(shard=f"{record.language}-{len(records):06d}.tar")
            for name, to in ((record.shard, renamed.shard), (record.index_name, renamed.index_name)):
                link(part / name, folder / to)
            records.append(renamed)
    write_atomically(folder / MANIFEST, manifest_bytes(records))


def link(path: Path, to: Path) -> None:
    """Give a file a second name, or a copy where the file system has no links."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def lock_folder(folder: Path) -> IO[str]:
    """An open file that keeps other writers off a folder until it is closed; rests of killed ones go.

    ValueError when another process writes there.
    """
    try:
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise ValueError(f"{folder} cannot be written ({error.strerror}); check path and rights") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise ValueError(f"{folder} has another writer; give each language to one process") from None
    for rest in folder.glob(".*.tmp"):
        rest.unlink()
    return lock
