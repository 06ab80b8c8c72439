"""Decide: what becomes of each document of a language, over its columns alone, without a text."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.config import Recipe
from data_pipelines.progress import Heartbeat
from data_pipelines.steps.collect import document_of
from data_pipelines.steps.columns import column, mapped
from data_pipelines.steps.document import drop
from data_pipelines.steps.duplicates import drop_duplicate
from data_pipelines.steps.gather import Gathered, joined_bands
from data_pipelines.steps.holdout import drawn
from data_pipelines.steps.join import BandIndex, mark_near, mark_repeats
from data_pipelines.steps.paragraphs import PARAGRAPH, take_out, too_little
from data_pipelines.steps.units import Unit, UnitStep

ROWS = 1 << 16  # documents whose verdicts are in memory together
VERDICTS = ("", "heldout", "exact_duplicate", "near_duplicate", "repeated_paragraphs", "small_language")


class DecideDocuments(UnitStep):
    """Writes columns over all parts of a language: verdict (uint8, of VERDICTS), first, shares and sizes as
    join.mark_near() sets them, marks (uint8) of each paragraph.

    One task for a language: all large arrays are files, 17 bytes for each document and 10 for each band it shares. On
    the heap is what `run.sort_memory_mib` allows, and 40 bytes for each paragraph of a part. Signatures are read where
    documents share a band: a language whose signatures exceed the machine's memory wants a disk of fast random reads.
    """

    name = "decide"

    def __init__(
        self, folder: Path, tasks: list[list[Unit]], progress: Path, gathered: Path, joined: Path, recipe: Recipe
    ):
        super().__init__(folder, tasks, progress)
        self.gathered, self.joined = gathered, joined
        self.asked = recipe.steps
        self.near, self.heldout = recipe.deduplicate, recipe.heldout
        self.min_documents, self.min_characters = recipe.shards.min_documents, recipe.filter.min_characters
        self.memory = recipe.run.sort_memory_mib * 2**20

    def make(self, unit: Unit, folder: Path) -> None:
        gathered, joined = Gathered(self.gathered / unit.language), self.joined / unit.language
        total = gathered.total
        verdicts = column(folder / "verdict", np.uint8, (total,))
        first = column(folder / "first", np.uint32, (total,))
        if "exact" in self.asked:
            (path,) = joined.glob("*/first")
            found = mapped(path, np.uint32)
            for start in range(0, total, ROWS):
                first[start : start + ROWS] = found[start : start + ROWS]
            give(verdicts, first, "exact_duplicate")
        if "near" in self.asked:
            shares, sizes = (column(folder / name, kind, (total,)) for name, kind in NEAR.items())
            signatures = gathered.column("signatures", "<u4", self.near.bands * self.near.rows)
            mark_near(
                BandIndex(signatures, joined_bands(joined, total), folder),
                self.near.min_similarity,
                first,
                shares,
                sizes,
            )
            give(verdicts, first, "near_duplicate")
            (folder / "slots").unlink()
        if "paragraphs" in self.asked:
            self.paragraphs(gathered, folder, verdicts)
        if "hold_out" in self.asked:
            ids = gathered.column("ids", "V16")
            names = (bytes(ids[place]).hex() for place in kept_places(verdicts))
            drawn_verdicts = drawn(names, self.heldout, self.min_documents)
            for place, verdict in zip(kept_places(verdicts), drawn_verdicts, strict=True):
                verdicts[place] = VERDICTS.index(verdict)

    def paragraphs(self, gathered: Gathered, folder: Path, verdicts: np.ndarray) -> None:
        """Marks the paragraphs that documents before had; drops those of which too little is left."""
        rows = gathered.column("paragraphs", PARAGRAPH)
        ends = gathered.column("paragraph_ends", "<u8").arrays
        # Of the documents that are still kept.
        keys = column(folder / "keys", np.uint64, (len(rows),))
        used = 0
        parts = [slice(start, start + size) for start, size in zip(gathered.starts, gathered.sizes, strict=True)]
        for part, array, end in zip(parts, rows.arrays, ends, strict=True):
            mine = array["key"][of_kept(verdicts[part], end)]
            keys[used : used + len(mine)] = mine
            used += len(mine)
        found = column(folder / "found", np.uint8, (used,))
        mark_repeats(keys[:used], self.memory, found)
        marks = column(folder / "marks", np.uint8, (len(rows),))
        used = 0
        for start, part, array, end in zip(rows.starts, parts, rows.arrays, ends, strict=False):
            here, mask = marks[start : start + len(array)], of_kept(verdicts[part], end)
            count = int(mask.sum())
            here[mask] = found[used : used + count]
            used += count
            gone = too_little(here, array["letters"], end, self.min_characters)
            verdicts[part][gone] = VERDICTS.index("repeated_paragraphs")
        for name in ("keys", "found"):
            (folder / name).unlink()


NEAR = {"shares": np.float64, "sizes": np.uint32}


def of_kept(verdicts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Whether paragraphs, which end at `ends` for each document, are of one without a verdict."""
    counts = ends - np.concatenate((np.zeros(1, np.uint64), ends[:-1]))[: len(ends)]
    return np.repeat(verdicts == 0, counts.astype(np.int64))


def give(verdicts: np.ndarray, first: np.ndarray, verdict: str) -> None:
    """A verdict to those that have a first one and no other verdict."""
    for start in range(0, len(verdicts), ROWS):
        block = verdicts[start : start + ROWS]
        block[(first[start : start + ROWS] > 0) & (block == 0)] = VERDICTS.index(verdict)


def kept_places(verdicts: np.ndarray) -> Iterator[int]:
    """The places without a verdict; those up to the one given may get one meanwhile."""
    for start in range(0, len(verdicts), ROWS):
        yield from (start + np.flatnonzero(verdicts[start : start + ROWS] == 0)).tolist()


class LoadDecided(PipelineStep):
    """Yields the documents of this task's parts with what was decided; metadata["unit"] is a part's number in the task.

    Leaves out parts that stand in `made`, the folder of the step after.
    """

    type, name = "xlscale", "load"

    def __init__(self, gathered: Path, decided: Path, made: Path, tasks: list[list[Unit]], progress: Path):
        super().__init__()
        self.gathered, self.decided, self.made, self.tasks, self.progress = gathered, decided, made, tasks, progress

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        units = self.tasks[rank]
        heartbeat = Heartbeat(self.progress / f"write-{rank:05d}", sum(unit.size for unit in units))
        done = 0
        for number, unit in enumerate(units):
            if (self.made / unit.path).exists():
                done += unit.size
                continue
            for document, size in self.documents(unit):
                document.metadata["unit"] = number
                yield document
                done += size
                heartbeat.beat(done)

    def documents(self, unit: Unit) -> Iterator[tuple[Document, int]]:
        """The documents of a part, and the bytes of each."""
        gathered, decided = Gathered(self.gathered / unit.language), self.decided / unit.language
        part = int(unit.name)
        start, size, folder = gathered.starts[part], gathered.sizes[part], gathered.parts[part]
        here = slice(start, start + size)
        ids = gathered.column("ids", "V16")
        verdicts, first = mapped(decided / "verdict", np.uint8)[here], mapped(decided / "first", np.uint32)[here]
        shares = sizes = marks = None
        if (decided / "sizes").exists():
            shares, sizes = (mapped(decided / name, kind)[here] for name, kind in NEAR.items())
        if (decided / "marks").exists():
            begin = int(gathered.column("paragraphs", PARAGRAPH).starts[part])
            marks, ends = mapped(decided / "marks", np.uint8)[begin:], mapped(folder / "paragraph_ends", "<u8")
        with (folder / "documents.jsonl").open("rb") as file:
            for i, line in enumerate(file):
                document, verdict = document_of(line), VERDICTS[verdicts[i]]
                if first[i]:
                    share = float(shares[i]) if shares is not None else 0.0
                    drop_duplicate(document, verdict, bytes(ids[int(first[i]) - 1]).hex(), share)
                else:
                    if sizes is not None and sizes[i]:
                        document.metadata["cluster_size"] = int(sizes[i]) + 1
                    if marks is not None:
                        take_out(document, marks[int(ends[i - 1]) if i else 0 : int(ends[i])])
                    if verdict == "heldout":
                        document.metadata["heldout"] = True
                    elif verdict:
                        drop(document, verdict)
                yield document, len(line)
