"""Corpora that are text already: a document per line (jsonl), per row (parquet), or between empty lines (txt)."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from data_pipelines.config import ReadConfig
from data_pipelines.steps.unpack import BROKEN, SUFFIXES, open_unpacked
from xlscale.languages import from_iso

ROWS = 256  # of a parquet file in memory at once, for each reader
ESCAPED = 8  # times max_page_bytes that a line may have: JSON writes a character of two bytes in six
KINDS = {
    "warc": (".warc", ".wet"),
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "parquet": (".parquet",),
    "txt": (".txt",),
    "index": (".cdxj", ".cdx"),
}


class Row(NamedTuple):
    """A document of a corpus: its number in the file from 0, its fields, and how many bytes were read up to it."""

    number: int
    fields: dict[str, Any]
    done: int


def kind_of(path: str, config: ReadConfig) -> str:
    """How a file is read: config.format, or by its name; ValueError if that says nothing."""
    if config.format != "auto":
        return config.format
    name = Path(path).name.lower()
    while name.endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    for kind, endings in KINDS.items():
        if name.endswith(endings):
            return kind
    known = ", ".join(ending for endings in KINDS.values() for ending in endings)
    raise ValueError(f"{path}: its name does not end in {known} (and {', '.join(SUFFIXES)}); "
                     f"set read.format to {', '.join(KINDS)}")  # fmt: skip


def language_of_path(path: str) -> str | None:
    """Our code for the language in a file's name or, if it has none there, of the two folders above it.

    As published corpora name their files: `de.txt.xz`, `fr_meta.jsonl.gz`, `data/deu_Latn/train/000_00000.parquet`.
    """
    parts = [Path(path).name.partition(".")[0], *(parent.name for parent in list(Path(path).parents)[:2])]
    return next((code for part in parts if part and (code := language_of_name(part))), None)


def language_of_name(name: str) -> str | None:
    """Our code for `de`, `deu_Latn`, and CC-100's `ta_rom` and `my_zaw`: romanised, and Burmese in Zawgyi."""
    # Else ta_rom would be Tamil in its own script.
    return from_iso(re.sub("_rom$", "_Latn", re.sub("_zaw$", "_Qaag", name)))


def jsonl(path: str, config: ReadConfig) -> Iterator[Row | str]:
    """The lines of a file, each an object; what is none comes as a string that says so."""
    stream, done = open_unpacked(path)
    with stream:
        for number, line in enumerate(_lines(stream, ESCAPED * config.max_page_bytes)):
            if not line.strip():
                continue
            if len(line) == ESCAPED * config.max_page_bytes:  # only its beginning: enough to be too large
                yield Row(number, {config.text_field: line.decode("utf-8", "replace")}, done())
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:  # of UTF-8 too
                yield f"line {number + 1} is no JSON ({error})"
                continue
            if isinstance(fields, dict):
                yield Row(number, fields, done())
            else:
                yield f"line {number + 1} is no JSON object"


def txt(path: str, config: ReadConfig) -> Iterator[Row | str]:
    """Documents between empty lines, as in CC-100; what is not UTF-8 in them becomes U+FFFD."""
    stream, done = open_unpacked(path)
    with stream:
        lines, size, number = list[bytes](), 0, 0
        for line in _lines(stream, config.max_page_bytes + 1):
            if line.strip():
                size += len(line)
                # Beyond the limit it is dropped, so that one line more than is allowed is enough.
                if size - len(line) <= config.max_page_bytes:
                    lines.append(line)
            elif lines:
                yield _paragraphs(number, lines, config, done())
                lines, size, number = [], 0, number + 1
        if lines:
            yield _paragraphs(number, lines, config, done())


def _paragraphs(number: int, lines: list[bytes], config: ReadConfig, done: int) -> Row:
    return Row(number, {config.text_field: b"".join(lines).decode("utf-8", "replace")}, done)


def parquet(path: str, config: ReadConfig) -> Iterator[Row | str]:
    """The rows of a file: its columns of text, address and language, as many of them as it has."""
    import pyarrow.parquet  # an extra: archives.py says so before anything runs

    parquet_file, size = pyarrow.parquet.ParquetFile(path), Path(path).stat().st_size
    wanted = (config.text_field, config.url_field, config.language_field)
    columns = [name for name in wanted if name.partition(".")[0] in parquet_file.schema_arrow.names]
    if config.text_field not in columns:
        there = ", ".join(parquet_file.schema_arrow.names)
        yield f"no column {config.text_field!r}; there are {there}: set read.text_field"
        return
    number, rows = 0, max(1, parquet_file.metadata.num_rows)
    for batch in parquet_file.iter_batches(batch_size=ROWS, columns=columns):
        for fields in batch.to_pylist():
            yield Row(number, fields, size * number // rows)
            number += 1


READERS: dict[str, Callable[[str, ReadConfig], Iterator[Row | str]]] = {"jsonl": jsonl, "txt": txt, "parquet": parquet}


def rows(path: str, kind: str, config: ReadConfig) -> Iterator[Row | str]:
    """The documents of a corpus file; a damaged place comes as a string, one that ends the file as the last."""
    read = Path(path).stat().st_size
    try:
        if not read:
            yield "the file is empty"
        else:
            yield from READERS[kind](path, config)
    except (EOFError, OSError, ValueError, *BROKEN) as error:  # pyarrow's errors are ValueErrors and OSErrors
        yield f"{error}; what follows is lost"


def _lines(stream: IO[bytes], limit: int) -> Iterator[bytes]:
    """Lines of at most `limit` bytes; of a longer one the beginning."""
    while line := stream.readline(limit):
        yield line
        while len(line) == limit and not line.endswith(b"\n"):
            line = stream.readline(limit)
