"""Index: the results of a query to CommonCrawl's index, and exactly those records by range reads.

Lines as its server answers (CDXJ, or JSON with output=json), classic CDX, or columns of the columnar index as parquet
or csv. What counts of a row is where its record lies: file, offset, length.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from fastwarc import WarcRecord

from data_pipelines.config import ReadConfig
from data_pipelines.steps.fetch import read_ranges
from data_pipelines.steps.unpack import BROKEN, SUFFIXES, open_unpacked
from data_pipelines.steps.warc import MAX_MEMBER, records_in
from xlscale.data.remote import is_url

BATCH = 4096  # rows that are put in the order of their files
TOGETHER = 32  # records asked for at once
MAX_BYTES = 1 << 26  # of the records that are in memory at once, one more at most
CDX = "N b a m s k r M S V g"  # the fields of a CDX file that names none
NAMES = {  # ours -> those of CDXJ, of the columnar index, of CDX
    "filename": ("filename", "warc_filename", "g"),
    "offset": ("offset", "warc_record_offset", "V"),
    "length": ("length", "warc_record_length", "S"),
}


class Place(NamedTuple):
    """Where a record lies: a file or URL, its first byte, its bytes there."""

    file: str
    offset: int
    length: int


class Found(NamedTuple):
    """A record that a row of an index names, or what is wrong with it; bytes of the index that were read up to it."""

    place: Place
    record: WarcRecord | str
    done: int


def indexed(path: str, config: ReadConfig) -> Iterator[Found]:
    """The records that an index names; FetchError where the network fails, what is damaged comes as a string."""
    places, together = _places(path, config), 1  # the first alone: a server without ranges sends whole files
    while batch := list(islice(places, BATCH)):
        yield from (found for found in batch if isinstance(found, Found))
        rows = sorted(row for row in batch if not isinstance(row, Found))
        done = max((row[1] for row in rows), default=0)
        while rows:
            size = count = 0
            while count < min(together, len(rows)) and size < MAX_BYTES:
                size += rows[count][0].length
                count += 1
            some, rows, together = rows[:count], rows[count:], TOGETHER
            for (place, _), content in zip(some, read_ranges([row[0] for row in some], config.attempts), strict=True):
                yield Found(place, _record(content) if isinstance(content, bytes) else content, done)


def _record(content: bytes) -> WarcRecord | str:
    """The one record in these bytes."""
    _, found = next(records_in(content), (0, "no bytes are there"))
    return found


def _places(path: str, config: ReadConfig) -> Iterator[tuple[Place, int] | Found]:
    """(place, bytes of the index read up to it), or what is wrong with a row."""
    done = 0
    try:
        for number, (fields, done) in enumerate(_reader(path)(path)):
            place = _place(fields, config.listing_base)
            yield (place, done) if place else Found(Place(path, done, 0), f"row {number + 1} of the index does not say "
                "where a record lies: it has no filename, offset and length that fit", done)  # fmt: skip
    except (EOFError, OSError, ValueError, *BROKEN) as error:  # pyarrow's errors are ValueErrors and OSErrors
        yield Found(Place(path, done, 0), f"{error}; what follows in the index is lost", done)


def _place(fields: dict[str, Any], base: str) -> Place | None:
    values = {ours: next((fields[name] for name in names if name in fields), "") for ours, names in NAMES.items()}
    file, offset, length = (str(value).strip() for value in values.values())
    if not (file and offset.isdecimal() and length.isdecimal() and 0 < int(length) <= MAX_MEMBER):
        return None
    return Place(file if is_url(file) else f"{base.rstrip('/')}/{file.lstrip('/')}", int(offset), int(length))


def _reader(path: str) -> Callable[[str], Iterator[tuple[dict[str, Any], int]]]:
    name = Path(path).name.lower()
    while name.endswith(SUFFIXES):
        name = name.rpartition(".")[0]
    return _parquet if name.endswith(".parquet") else _csv if name.endswith(".csv") else _lines


def _lines(path: str) -> Iterator[tuple[dict[str, Any], int]]:
    """A JSON object in each, after the address and time in CDXJ; or the fields of CDX."""
    stream, done = open_unpacked(path)
    names = CDX.split()
    with stream:
        for line in stream:
            text = line.decode("utf-8", "replace").strip()
            head, brace, rest = text.partition("{")
            if text.startswith("!"):  # pywb's remarks
                continue
            if text.startswith("CDX "):
                names = text.split()[1:]
            elif brace and (not head or head.endswith(" ")):
                try:
                    yield json.loads(brace + rest), done()
                except ValueError:
                    yield {}, done()
            elif text:
                yield dict(zip(names, text.split(), strict=False)), done()


def _csv(path: str) -> Iterator[tuple[dict[str, Any], int]]:
    stream, done = open_unpacked(path)
    with io.TextIOWrapper(stream, "utf-8", "replace", newline="") as text:
        for row in csv.DictReader(text):
            yield row, done()


def _parquet(path: str) -> Iterator[tuple[dict[str, Any], int]]:
    import pyarrow.parquet  # an extra: archives.py says so before anything runs

    file, size, number = pyarrow.parquet.ParquetFile(path), Path(path).stat().st_size, 0
    names = [name for ours in NAMES.values() for name in ours if name in file.schema_arrow.names]
    for batch in file.iter_batches(batch_size=BATCH, columns=names):
        for row in batch.to_pylist():
            number += 1
            yield row, size * number // file.metadata.num_rows
