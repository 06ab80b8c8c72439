"""The text shards of a corpus: what lies in their folder, and how a chunk of it is read (shard_writer.py writes).

<shards>/<language>/<language>-000000.tar   a WebDataset; a member `NNNNNNNN.jsonl` (or `.jsonl.zst`) is a chunk
                                            of documents of that language, one JSON object a line
                    <language>-000000.json  its index: offset, size, documents and crc32c of every chunk
                    manifest.jsonl          one line per shard; a shard counts if and only if its line is here

Tars made by others have any name and one document per member; foreign.py gives them index and manifest, and their
chunks are runs of members (members.py). With a single language all may lie in <shards> itself.
"""

import hashlib
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from errno import EDQUOT, ENOSPC
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from xlscale.data.manifest import MANIFEST, Index, ShardRecord, parse_manifest
from xlscale.data.members import DocumentError, MemberError, documents_in, usable_texts
from xlscale.data.remote import FetchError
from xlscale.data.storage import Downloads, RemoteFile, Storage
from xlscale.languages import language_id

CHUNK_CAUSES = ("missing", "cut short", "checksum", "bad member", "network")
_INDICES = 128  # indices of shards that a process keeps, 8 kB each for 256 chunks


class DamagedChunk(ValueError):  # noqa: N818
    """A chunk that cannot be read; `shard` as "de_DE/de_DE-000003.tar", `cause` one of CHUNK_CAUSES."""

    def __init__(self, shard: str, cause: str, message: str):
        super().__init__(shard, cause, message)  # all three, so that it pickles
        self.shard, self.cause, self.message = shard, cause, message

    def __str__(self) -> str:
        return self.message


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    fsync_path(path.parent)


def file_sha256(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_path(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_is_full(error: Exception) -> bool:
    """Whether something was not written for want of room, or of what a quota leaves."""
    # safetensors and shutil.copytree hand the system's error on as text only.
    return any(mark in f"{error}" for code in (ENOSPC, EDQUOT) for mark in (f"[Errno {code}]", f"(os error {code})"))


def read_manifest(folder: Path) -> list[ShardRecord]:
    """The published shards in a local folder, none if it has no manifest."""
    path = folder / MANIFEST
    return parse_manifest(path.read_bytes(), str(path)) if path.exists() else []


@dataclass(frozen=True)
class _Language:
    """The shards of one language, addressed by chunk number over all of them."""

    code: str
    prefix: str
    """Of the names of its files in the corpus' folder: "de_DE/", or "" where they lie in it."""
    records: list[ShardRecord]

    @cached_property
    def ends(self) -> np.ndarray:
        """Number of chunks up to and with each shard, [shards] int64."""
        return np.cumsum([record.chunks for record in self.records])

    def locate(self, number: int) -> tuple[int, int]:
        """Which shard a chunk is in, and which chunk of it."""
        if not 0 <= number < self.ends[-1]:
            raise IndexError(f"{self.code}: chunk {number} of {self.ends[-1]}")
        shard = int(np.searchsorted(self.ends, number, side="right"))
        return shard, number - int(self.ends[shard]) + self.records[shard].chunks


class Corpus:
    """The published shards of some languages, read chunk by chunk; it holds no open file and pickles."""

    def __init__(self, storage: Storage, languages: dict[str, _Language]):
        self._storage, self._languages = storage, languages
        self._indices: OrderedDict[tuple[str, int], Index] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": OrderedDict()}

    @classmethod
    def open(
        cls,
        folder: str | Path,
        languages: Sequence[str] = (),
        downloads: Downloads | None = None,
        check: bool = True,
    ) -> "Corpus":
        """Open a folder of shards, or its URL, for `languages` or (none given) all in it.

        With `check`, sizes of a local folder are compared with the manifests. ValueError lists every shard
        missing or cut short, one a line; a remote folder shows its faults when a chunk is read.
        """
        storage = Storage(folder, downloads)
        try:
            return cls(storage, _open_languages(storage, languages, check))
        except FetchError as error:
            raise ValueError(f"{folder}: the manifests cannot be read: {error}") from None

    @property
    def is_remote(self) -> bool:
        """Whether reading may have to wait for a network."""
        return self._storage.is_remote

    @property
    def folder(self) -> Path:
        """The folder; ValueError for a URL."""
        if isinstance(self._storage.base, Path):
            return self._storage.base
        raise ValueError(f"{self._storage} is remote; name a local folder for what is derived from it (data.cache)")

    @property
    def languages(self) -> list[str]:
        """Codes of the languages opened, sorted."""
        return list(self._languages)

    def records(self, language: str) -> list[ShardRecord]:
        """The manifest of one language."""
        return self._languages[language].records

    def chunks(self, language: str) -> int:
        """Number of chunks of one language."""
        return int(self._languages[language].ends[-1])

    def documents(self, language: str) -> int:
        """Number of documents of one language, those that cannot be used among them."""
        return sum(record.documents for record in self.records(language))

    @cached_property
    def fingerprint(self) -> str:
        """Digest (sha256, hex) of what the languages' shards hold, and how it is divided, in order."""
        facts = attrgetter("shard", "size", "sha256", "index_sha256", "format", "text_field", "documents", "chunks")
        rows = [(language, *facts(record)) for language in self.languages for record in self.records(language)]
        return hashlib.sha256(json.dumps(rows).encode("utf-8")).hexdigest()

    def shard(self, language: str, number: int) -> tuple[int, int]:
        """Which of records(language) a chunk is in, and which chunk of that shard it is."""
        return self._languages[language].locate(number)

    def read_chunk(self, language: str, number: int) -> list[dict[str, Any]]:
        """The documents of a chunk; DamagedChunk, and ValueError if one of them cannot be used."""
        documents = []
        for place, document in enumerate(self._documents(language, number)):
            if isinstance(document, DocumentError):
                record = self.records(language)[self.shard(language, number)[0]]
                where = f"{self._where(language, record)}: chunk {number} of {language}, document {place}"
                raise ValueError(f"{where}: {document.cause}; write the shard anew without it")
            documents.append(document)
        return documents

    def read_texts(self, language: str, number: int, max_characters: int) -> tuple[list[str], Counter[str]]:
        """The texts of a chunk, "" for documents that cannot be used, and how many these are by DOCUMENT_CAUSES.

        A pure function of the chunk's bytes, which are verified; DamagedChunk if they are not those written.
        """
        return usable_texts(iter(self._documents(language, number)), max_characters)

    def read(self, language: str) -> Iterator[dict[str, Any]]:
        """All documents of a language, in the order of the shards."""
        for number in range(self.chunks(language)):
            yield from self.read_chunk(language, number)

    def read_ahead(self, language: str, chunks: Iterable[int]) -> None:
        """Have the shards of some chunks fetched in the background, where they are remote."""
        if self._storage.is_remote:
            shards = dict.fromkeys(self.shard(language, number)[0] for number in chunks)
            records = [self.records(language)[shard] for shard in shards]
            self._storage.ahead(f for record in records for f in self._files(language, record))

    def _files(self, language: str, record: ShardRecord) -> tuple[RemoteFile, RemoteFile]:
        """The index and the tar of a shard."""
        prefix = self._languages[language].prefix
        return (
            RemoteFile(prefix + record.index_name, None, record.index_sha256),
            RemoteFile(prefix + record.shard, record.size, record.sha256),
        )

    def _where(self, language: str, record: ShardRecord) -> str:
        return self._storage.where(self._languages[language].prefix + record.shard)

    def _documents(self, language: str, number: int) -> list[dict[str, Any] | DocumentError]:
        """All documents of a chunk, as many as the index says; DamagedChunk."""
        shard, inside = self._languages[language].locate(number)
        record = self.records(language)[shard]
        index, (_, tar) = self._index(language, shard), self._files(language, record)
        offset, size, count, crc32c = (int(getattr(index, f.name)[inside]) for f in fields(Index))
        name, where = (
            f"{language}/{record.shard}",
            f"{self._storage.where(tar.name)}: chunk {number} of {language} (byte {offset})",
        )
        data = self._read(name, tar, offset, size)
        if self._storage.is_remote and google_crc32c.value(data) != crc32c:
            self._storage.forget(tar)  # it was whole when it came
            data = self._read(name, tar, offset, size)
        if len(data) != size:
            message = f"{where} has {len(data)} of {size} bytes: it is cut short; copy or write it anew"
            raise DamagedChunk(name, "cut short", message)
        if (found := google_crc32c.value(data)) != crc32c:
            message = f"{where} has crc32c {found:08x}, its index says {crc32c:08x}: the shard is damaged"
            raise DamagedChunk(name, "checksum", f"{message}; copy or write it anew")
        try:
            documents = list(documents_in(data, record.format, record.text_field))
            if len(documents) != count:
                raise MemberError(f"it holds {len(documents)} documents, its index says {count}")
        except MemberError as error:
            raise DamagedChunk(name, "bad member", f"{where}: {error}; write the shard anew") from None
        return documents

    def _read(self, name: str, file: RemoteFile, offset: int = 0, size: int = -1) -> bytes:
        """Bytes of a file of the shard `name`; DamagedChunk if it cannot be read."""
        where = self._storage.where(file.name)
        try:
            with self._storage.open(file) as opened:
                opened.seek(offset)
                return opened.read(size)
        except FetchError as error:
            raise DamagedChunk(name, error.cause, str(error)) from None
        except OSError as error:
            message = f"{where}: {error.strerror}; bring the shard back or write it anew"
            raise DamagedChunk(name, "missing", message) from None

    def _index(self, language: str, shard: int) -> Index:
        """The index of a shard; of all that were read those used last are kept."""
        if (language, shard) in self._indices:
            self._indices.move_to_end((language, shard))
            return self._indices[language, shard]
        record = self.records(language)[shard]
        name, (file, _) = f"{language}/{record.shard}", self._files(language, record)
        data = self._read(name, file)
        try:
            if hashlib.sha256(data).hexdigest() != record.index_sha256:
                raise ValueError("it is not the one published")
            index = Index.from_bytes(data)
            if len(index.size) != record.chunks:
                raise ValueError(f"it has {len(index.size)} chunks, {MANIFEST} says {record.chunks}")
        except (ValueError, KeyError, TypeError) as error:
            where = f"{self._storage.where(file.name)}: the index of {record.shard}"
            message = f"{where} cannot be read ({error}); copy or write the shard anew"
            raise DamagedChunk(name, "checksum", message) from None
        self._indices[language, shard] = index
        if len(self._indices) > _INDICES:
            self._indices.popitem(last=False)
        return index

    # The last one: below it, `bytes` is no type.
    def bytes(self, language: str) -> int:
        """UTF-8 bytes of the texts of one language."""
        return sum(record.bytes for record in self.records(language))


def _open_languages(storage: Storage, languages: Sequence[str], check: bool) -> dict[str, _Language]:
    """The manifests of a folder, checked; ValueError with a line for everything that is wrong."""
    if storage.is_remote and languages:  # many web servers list nothing
        found = [code for code in languages if code.isidentifier() and storage.exists(f"{code}/{MANIFEST}")]
    else:
        found = storage.folders_with(MANIFEST)
    prefixes = {code: f"{code}/" for code in found}
    manifests = {}
    if storage.exists(MANIFEST):  # of one language, whose shards lie in the folder itself
        manifests[""] = parse_manifest(storage.read_bytes(MANIFEST), storage.where(MANIFEST))
        prefixes |= {record.language: "" for record in manifests[""][:1]}
    if not prefixes:
        raise ValueError(
            f"{storage}: no shards here (no <language>/{MANIFEST}); write them with python -m data_pipelines CONFIG, "
            f"index those of others with xlscale data index, or set data.shards to the folder that has them"
        )
    problems = []
    for code in languages or prefixes:
        try:
            language_id(code)
        except ValueError as error:
            problems.append(str(error))
            continue
        if code not in prefixes:
            problems.append(f"{storage}: no shards of language {code!r}; there are {', '.join(sorted(prefixes))}")
    if problems:
        raise ValueError("\n".join(problems))
    opened = {}
    for code in sorted(set(languages) or prefixes):
        prefix = prefixes[code]
        path = storage.where(f"{prefix}{MANIFEST}")
        if prefix not in manifests:
            manifests[prefix] = parse_manifest(storage.read_bytes(f"{prefix}{MANIFEST}"), path)
        records = manifests[prefix]
        if not records:
            problems.append(f"{path}: empty; write the shards of {code} anew or remove the folder")
        if wrong := {record.language for record in records} - {code}:
            problems.append(f"{path}: holds {', '.join(sorted(wrong))}, not {code}; each language has its own folder")
        if check and isinstance(storage.base, Path):
            problems += [p for record in records for p in _check_shard(storage.base / prefix, record)]
        opened[code] = _Language(code, prefix, records)
    if problems:
        raise ValueError("\n".join(problems))
    return opened


def _check_shard(folder: Path, record: ShardRecord) -> list[str]:
    path = folder / record.shard
    if not path.exists():
        return [f"{path}: missing, but listed in {MANIFEST}; bring it back, or remove its line to go without it"]
    if (size := path.stat().st_size) != record.size:
        what = "cut short" if size < record.size else "not the one published"
        return [f"{path}: {size} bytes, {MANIFEST} says {record.size}: it is {what}; copy or write it anew"]
    return []
