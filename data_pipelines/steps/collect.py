"""Collect: the documents of one task, sorted by language and id, between the two stages."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from heapq import merge
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.children import die_with_pool
from data_pipelines.progress import Heartbeat
from data_pipelines.steps.document import dropped, write_lines
from data_pipelines.steps.tally import Tally

Order = tuple[str, str, int]


def order(row: dict[str, Any]) -> Order:
    """Documents go by id; the same page in two archives, by archive and place."""
    return row["id"], row["metadata"]["archive"], row["metadata"]["offset"]


class CollectDocuments(PipelineStep):
    """Writes `folder`/<task>/<language>.jsonl and tally.json, all of them or none; passes nothing on."""

    type, name = "xlscale", "collect"

    def __init__(self, folder: Path, samples: int):
        super().__init__()
        self.folder, self.samples = folder, samples

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        tally, rows = Tally(self.samples), defaultdict(list)
        read = 0
        for document in data:
            read += 1
            if dropped(document):
                tally.drop(document)
            else:
                row = {"id": document.id, "text": document.text, "metadata": document.metadata}
                rows[document.metadata["language"]].append(row)
        beside, final = self.folder / f".{rank:05d}", self.folder / f"{rank:05d}"
        for old in (beside, final):  # of this task, killed before it was marked as done
            shutil.rmtree(old, ignore_errors=True)
        with self.track_time("task"):
            for language, found in sorted(rows.items()):
                write_lines(beside / f"{language}.jsonl", sorted(found, key=order))
            tally.save(beside / "tally.json", read=read)
            beside.rename(final)
        yield from ()


class LoadDocuments(PipelineStep):
    """Yields the documents of one language per task, of all tasks before, by their ids."""

    type, name = "xlscale", "load"

    def __init__(self, folder: Path, languages: list[str], heartbeat: Path):
        super().__init__()
        self.folder, self.languages, self.heartbeat = folder, languages, heartbeat

    def run(self, data: DocumentsPipeline = None, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        die_with_pool()
        language = self.languages[rank]
        paths = sorted(self.folder.glob(f"[0-9]*/{language}.jsonl"))
        heartbeat = Heartbeat(self.heartbeat / f"write-{rank:05d}", sum(path.stat().st_size for path in paths))
        done = 0
        for row, size in merge(*map(_rows, paths), key=lambda pair: order(pair[0])):
            yield Document(text=row["text"], id=row["id"], metadata=row["metadata"])
            done += size
            heartbeat.beat(done)


def _rows(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    with path.open("rb") as file:
        for line in file:
            yield json.loads(line), len(line)


def collected_languages(folder: Path) -> list[str]:
    """The languages that the tasks before have found."""
    return sorted({path.stem for path in folder.glob("[0-9]*/*.jsonl")})


def collected_bytes(folder: Path, language: str) -> int:
    """How much the tasks before have found in a language."""
    return sum(path.stat().st_size for path in folder.glob(f"[0-9]*/{language}.jsonl"))
