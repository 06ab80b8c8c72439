"""What one sample of a text shard is, and how shards are written and read: the contract with data_pipelines.

<shards>/<language>/<language>-000000.tar   a WebDataset; a member `NNNNNNNN.jsonl` is a chunk of documents
                    <language>-000000.json  its index: offset, size, documents and crc32c of every chunk
                    manifest.jsonl          one line per shard; a shard counts if and only if its line is here
"""

import bisect
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, NamedTuple, Self

import google_crc32c

from xlscale.languages import language_id

MANIFEST = "manifest.jsonl"
_TAR_HEADER = 512  # bytes before a member's data: names are short, so every header is one USTAR block


class Chunk(NamedTuple):
    """Where a chunk's bytes lie inside its shard, and how they are checked."""

    offset: int
    size: int
    documents: int
    crc32c: int


@dataclass(frozen=True)
class ShardRecord:
    """A line of the manifest: what was published, and from what."""

    shard: str
    size: int
    sha256: str
    documents: int
    chunks: int
    characters: int
    source: str
    config_hash: str


def write_atomically(path: Path, data: bytes) -> None:
    """Put `data` at `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    fsync_path(path.parent)


def fsync_path(path: Path) -> None:
    """Make a file's bytes durable, or the names in a folder: a rename alone may be lost with the power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> list[ShardRecord]:
    """The published shards of one language folder, in order; ValueError names a line that is none."""
    path = folder / MANIFEST
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(ShardRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a manifest line ({error}); write these shards anew") from None
    return records


class ShardWriter:
    """Writes the documents of one language into shards, each published whole or not at all.

    Going on in a folder that holds shards adds to them. Same documents in, same bytes out. Only one writer
    per language: ValueError when another one holds the folder.
    """

    def __init__(
        self,
        folder: str | Path,
        language: str,
        source: str,
        config_hash: str,
        documents_per_chunk: int = 128,
        chunks_per_shard: int = 64,
    ):
        language_id(language)
        if documents_per_chunk < 1 or chunks_per_shard < 1:
            raise ValueError(f"{documents_per_chunk=} and {chunks_per_shard=} must both be at least 1")
        self.folder = Path(folder) / language
        self.language, self.source, self.config_hash = language, source, config_hash
        self.documents_per_chunk, self.chunks_per_shard = documents_per_chunk, chunks_per_shard
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise ValueError(f"{self.folder} has another writer; give each language to one process") from None
        for rest in self.folder.glob(".*.tmp"):
            rest.unlink()  # of a writer that was killed
        self.records = read_manifest(self.folder)
        self._lines: list[bytes] = []
        self._chunks: list[Chunk] = []
        self._characters = 0
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
        line = json.dumps(document, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        try:
            self._lines.append(line.encode("utf-8"))
        except UnicodeEncodeError:
            rule = "holds half a surrogate pair, which has no UTF-8 form; decode the page with errors='replace'"
            raise ValueError(f"{where}: {rule}") from None
        self._characters += len(text)
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
        number = sum(record.chunks for record in self.records) + len(self._chunks)
        offset = self._tar.tarstream.offset + _TAR_HEADER
        self._tar.write({"__key__": f"{number:08d}", "jsonl": data})
        self._chunks.append(Chunk(offset, len(data), len(self._lines), google_crc32c.value(data)))
        self._lines = []
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
        with beside.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        beside.replace(final)
        write_atomically(final.with_suffix(".json"), _index_bytes(self._chunks))
        record = ShardRecord(
            shard=final.name,
            size=final.stat().st_size,
            sha256=digest,
            documents=sum(chunk.documents for chunk in self._chunks),
            chunks=len(self._chunks),
            characters=self._characters,
            source=self.source,
            config_hash=self.config_hash,
        )
        self.records.append(record)
        lines = [json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in self.records]
        write_atomically(self.folder / MANIFEST, "".join(lines).encode("utf-8"))
        self._file, self._chunks, self._characters = None, [], 0


def _index_bytes(chunks: Sequence[Chunk]) -> bytes:
    """An index file: one column per field of Chunk."""
    columns = {name: [getattr(chunk, name) for chunk in chunks] for name in Chunk._fields}
    return json.dumps(columns, separators=(",", ":")).encode("ascii") + b"\n"


@dataclass(frozen=True)
class _Language:
    """The shards of one language, addressed by chunk number over all of them."""

    folder: Path
    records: list[ShardRecord]
    _indices: dict[int, list[Chunk]] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def ends(self) -> list[int]:
        """Number of chunks up to and with each shard."""
        return list(accumulate(record.chunks for record in self.records))

    def locate(self, number: int) -> tuple[Path, Chunk]:
        """The shard of a chunk, and where it lies there."""
        if not 0 <= number < self.ends[-1]:
            raise IndexError(f"{self.folder}: chunk {number} of {self.ends[-1]}")
        shard = bisect.bisect_right(self.ends, number)
        if shard not in self._indices:
            self._indices[shard] = _read_index(self.folder, self.records[shard])
        first = self.ends[shard] - self.records[shard].chunks
        return self.folder / self.records[shard].shard, self._indices[shard][number - first]


def _read_index(folder: Path, record: ShardRecord) -> list[Chunk]:
    path = (folder / record.shard).with_suffix(".json")
    try:
        columns = json.loads(path.read_bytes())
        chunks = [Chunk(*row) for row in zip(*(columns[name] for name in Chunk._fields), strict=True)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}: the index of {record.shard} cannot be read ({error}); write the shard anew"
        ) from None
    if len(chunks) != record.chunks:
        raise ValueError(f"{path}: holds {len(chunks)} chunks, {MANIFEST} says {record.chunks}; write the shard anew")
    return chunks


class Corpus:
    """The published shards of some languages, read chunk by chunk; it holds no open file and pickles."""

    def __init__(self, folder: Path, languages: dict[str, _Language]):
        self.folder = folder
        self._languages = languages

    @classmethod
    def open(cls, folder: str | Path, languages: Sequence[str] = ()) -> "Corpus":
        """Open a folder of shards, for `languages` or (none given) all in it.

        Sizes are compared with the manifests; ValueError lists every shard missing or cut short, one a line.
        """
        folder = Path(folder)
        found = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        if not found:
            raise ValueError(
                f"{folder}: no shards here (no <language>/{MANIFEST}); write them with "
                f"python -m data_pipelines CONFIG, or set data.shards to the folder that has them"
            )
        problems = []
        for code in languages or found:
            try:
                language_id(code)
            except ValueError as error:
                problems.append(str(error))
                continue
            if code not in found:
                problems.append(f"{folder}: no shards of language {code!r}; there are {', '.join(found)}")
        if problems:
            raise ValueError("\n".join(problems))
        opened = {}
        for code in sorted(set(languages) or found):
            records = read_manifest(folder / code)
            problems += [problem for record in records for problem in _check_shard(folder / code, record)]
            if not records:
                problems.append(
                    f"{folder / code / MANIFEST}: empty; write the shards of {code} anew or remove the folder"
                )
            opened[code] = _Language(folder / code, records)
        if problems:
            raise ValueError("\n".join(problems))
        return cls(folder, opened)

    @property
    def languages(self) -> list[str]:
        """Codes of the languages opened, sorted."""
        return list(self._languages)

    def records(self, language: str) -> list[ShardRecord]:
        """The manifest of one language."""
        return self._languages[language].records

    def chunks(self, language: str) -> int:
        """Number of chunks of one language."""
        return self._languages[language].ends[-1]

    def documents(self, language: str) -> int:
        """Number of documents of one language."""
        return sum(record.documents for record in self.records(language))

    @cached_property
    def fingerprint(self) -> str:
        """Digest (sha256, hex) of what the languages' shards hold, in order."""
        rows = [
            (language, record.shard, record.size, record.sha256, record.documents, record.chunks)
            for language in self.languages
            for record in self.records(language)
        ]
        return hashlib.sha256(json.dumps(rows).encode("utf-8")).hexdigest()

    def read_chunk(self, language: str, number: int) -> list[dict[str, Any]]:
        """The documents of a language's chunk `number`; ValueError if its bytes are not those written."""
        path, chunk = self._languages[language].locate(number)
        try:
            with path.open("rb") as file:
                file.seek(chunk.offset)
                data = file.read(chunk.size)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; bring the shard back or write it anew") from None
        where = f"{path}: chunk {number} of {language} (byte {chunk.offset})"
        if len(data) != chunk.size:
            raise ValueError(f"{where} has {len(data)} of {chunk.size} bytes: it is cut short; copy or write it anew")
        if (found := google_crc32c.value(data)) != chunk.crc32c:
            raise ValueError(
                f"{where} has crc32c {found:08x}, its index says {chunk.crc32c:08x}: the shard is damaged; "
                f"copy or write it anew"
            )
        documents = [json.loads(line) for line in data.splitlines()]
        assert len(documents) == chunk.documents, where
        return documents

    def read(self, language: str) -> Iterator[dict[str, Any]]:
        """All documents of a language, in the order of the shards."""
        for number in range(self.chunks(language)):
            yield from self.read_chunk(language, number)


def _check_shard(folder: Path, record: ShardRecord) -> list[str]:
    path = folder / record.shard
    if not re.fullmatch(rf"{re.escape(folder.name)}-\d{{6,}}\.tar", record.shard):
        return [f"{folder / MANIFEST}: {record.shard!r} is no shard's name ({folder.name}-000000.tar); mend it"]
    if not path.exists():
        return [f"{path}: missing, but listed in {MANIFEST}; bring it back, or remove its line to go without it"]
    if (size := path.stat().st_size) != record.size:
        what = "cut short" if size < record.size else "not the one published"
        return [f"{path}: {size} bytes, {MANIFEST} says {record.size}: it is {what}; copy or write it anew"]
    return []
