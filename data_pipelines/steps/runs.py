"""Sorted runs: documents by their ids, and what is compared of them beside each; merged without reading a text.

A run is <path>.jsonl, a document a line; <path>.facts, a row of facts_type() for each; <path>.paragraphs, a row of
PARAGRAPH for each line that has a key.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_pipelines.steps.columns import ROWS, column, mapped
from data_pipelines.steps.paragraphs import PARAGRAPH

MOST_FILES = 200  # runs that are merged at once: more are merged in rounds
SUFFIXES = (".jsonl", ".facts", ".paragraphs")


class Row(NamedTuple):
    """A document of a run."""

    id: bytes
    """16 bytes."""
    source: int
    """The number of its archive."""
    line: bytes
    exact: bytes
    """duplicates.exact_key(), 16 bytes."""
    signature: bytes
    """duplicates.signature(), or nothing."""
    paragraphs: bytes
    """paragraphs.paragraphs(), or nothing."""


def facts_type(hashes: int) -> np.dtype:
    """What is compared of a document whose signature has so many hashes; ends are those in the two other files."""
    return np.dtype(
        [
            ("end", "<u8"),
            ("paragraphs_end", "<u8"),
            ("id", ">u8", 2),
            ("source", "<u8"),
            ("exact", "<u8", 2),
            ("signature", "<u4", hashes),
        ]
    )


def write_run(path: Path, rows: Iterable[Row]) -> None:
    """A run of rows that are sorted by their ids."""
    path.parent.mkdir(parents=True, exist_ok=True)
    end = paragraphs_end = 0
    with ExitStack() as stack:
        lines, facts, paragraphs = (stack.enter_context(_file(path, suffix).open("wb")) for suffix in SUFFIXES)
        for row in rows:
            end += lines.write(row.line)
            paragraphs_end += paragraphs.write(row.paragraphs) // PARAGRAPH.itemsize
            numbers = (end.to_bytes(8, "little"), paragraphs_end.to_bytes(8, "little"))
            facts.write(b"".join((*numbers, row.id, row.source.to_bytes(8, "little"), row.exact, row.signature)))


def read_run(path: Path, dtype: np.dtype) -> Iterator[Row]:
    """The rows of a run."""
    with _file(path, ".jsonl").open("rb") as lines, _file(path, ".paragraphs").open("rb") as paragraphs:
        begin = 0
        for fact in mapped(_file(path, ".facts"), dtype):
            end = int(fact["paragraphs_end"])
            rest = paragraphs.read((end - begin) * PARAGRAPH.itemsize)
            name, exact, signed = (fact[field].tobytes() for field in ("id", "exact", "signature"))
            yield Row(name, int(fact["source"]), lines.readline(), exact, signed, rest)
            begin = end


def move_run(path: Path, to: Path) -> None:
    """Give a run another name."""
    for suffix in SUFFIXES:
        _file(path, suffix).replace(_file(to, suffix))


def remove_run(path: Path) -> None:
    """Take a run away."""
    for suffix in SUFFIXES:
        _file(path, suffix).unlink()


def merge_runs(runs: list[Path], to: Path, dtype: np.dtype, part: int = 0, parts: int = 1) -> None:
    """One run of several, or of the ids that are in one of so many equal parts of all that there may be.

    Of documents with the same id that of an earlier run comes first. Takes 64 bytes of memory for each document.
    """
    if len(runs) > MOST_FILES:
        groups = [runs[i : i + MOST_FILES] for i in range(0, len(runs), MOST_FILES)]
        between = [to.with_name(f"{to.name}-{len(runs)}-{i}") for i in range(len(groups))]
        for group, run in zip(groups, between, strict=True):
            merge_runs(group, run, dtype, part, parts)
        merge_runs(between, to, dtype)
        for run in between:
            remove_run(run)
        return
    facts = [mapped(_file(run, ".facts"), dtype) for run in runs]
    bounds = [(_first(rows, part, parts), _first(rows, part + 1, parts)) for rows in facts]
    counts = [end - begin for begin, end in bounds]
    ids = np.concatenate([rows["id"][a:b] for rows, (a, b) in zip(facts, bounds, strict=True)]).astype("<u8")
    order = np.lexsort((ids[:, 1], ids[:, 0]))  # stable
    del ids
    which = np.repeat(np.arange(len(runs), dtype=np.uint16), counts)[order]
    sizes = _merge_facts(to, facts, bounds, order)
    for suffix, name, size in ((".jsonl", "end", 1), (".paragraphs", "paragraphs_end", PARAGRAPH.itemsize)):
        with ExitStack() as stack:
            files = [stack.enter_context(_file(run, suffix).open("rb")) for run in runs]
            for file, rows, (begin, _) in zip(files, facts, bounds, strict=True):
                file.seek(int(rows[name][begin - 1]) * size if begin else 0)
            out = stack.enter_context(_file(to, suffix).open("wb"))
            for start in range(0, len(which), ROWS):
                some, lengths = which[start : start + ROWS].tolist(), sizes[name][start : start + ROWS].tolist()
                for run, length in zip(some, lengths, strict=True):
                    out.write(files[run].read(length * size))


def _merge_facts(
    to: Path, facts: list[np.ndarray], bounds: list[tuple[int, int]], order: np.ndarray
) -> dict[str, np.ndarray]:
    """Writes the facts; the sizes of what stands in the two other files, in the order of the documents."""
    merged = column(_file(to, ".facts"), facts[0].dtype, (len(order),))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    sizes = {name: np.empty(len(order), np.int64) for name in ("end", "paragraphs_end")}
    start = 0
    for rows, (begin, end) in zip(facts, bounds, strict=True):
        here = place[start : start + end - begin]
        merged[here] = rows[begin:end]
        for name, values in sizes.items():
            ends = rows[name][begin:end].astype(np.int64)
            values[here] = np.diff(ends, prepend=int(rows[name][begin - 1]) if begin else 0)
        start += end - begin
    for name, values in sizes.items():
        merged[name] = np.cumsum(values)
    return sizes


def _first(rows: np.ndarray, part: int, parts: int) -> int:
    """The first row of a part."""
    return bisect_left(rows, part, key=lambda row: (int(row["id"][0]) >> 32) * parts >> 32)


def _file(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)
