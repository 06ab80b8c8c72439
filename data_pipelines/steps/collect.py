"""Collect: the documents of one task by language, each language's by their ids."""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.config import DeduplicateConfig, ReportConfig
from data_pipelines.steps.aside import DroppedDocuments
from data_pipelines.steps.document import drop, dropped
from data_pipelines.steps.duplicates import exact_key, signature
from data_pipelines.steps.paragraphs import paragraphs
from data_pipelines.steps.runs import Row, facts_type, merge_runs, move_run, read_run, write_run
from data_pipelines.steps.tally import Tally

ROW_BYTES = 400  # of memory that a document takes besides what is written of it


class CollectDocuments(PipelineStep):
    """Writes a run (runs.py) `folder`/<task>/<language> for each language and tally.json, all of them or none.

    Passes nothing on. Documents of an archive that ReadArchives has noted as bad in `archives`/<task>.jsonl are
    dropped. In memory are as many as take `memory_mib`: more are written as runs and merged at the end.
    """

    type, name = "xlscale", "collect"

    def __init__(
        self,
        folder: Path,
        archives: Path,
        compared: list[str],
        config: DeduplicateConfig,
        report: ReportConfig,
        memory_mib: int = 256,
    ):
        """`compared`: "near" where documents have signatures, "paragraphs" where keys of these are to be written."""
        super().__init__()
        self.folder, self.archives, self.report = folder, archives, report
        self.memory, self.with_paragraphs = memory_mib * 2**20, "paragraphs" in compared
        self.facts = facts_type(config.bands * config.rows if "near" in compared else 0)

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        beside, final = self.folder / f".{rank:05d}", self.folder / f"{rank:05d}"
        for old in (beside, final):  # of this task, killed before it was marked as done
            shutil.rmtree(old, ignore_errors=True)
        tally = Tally(self.report)
        aside = DroppedDocuments.of(beside, self.report)
        rows, runs = defaultdict[str, list[Row]](list), defaultdict[str, list[Path]](list)
        read = taken = 0
        for document in data:
            read += 1
            source = document.metadata.pop("source", 0)
            if dropped(document):
                tally.drop(document)
                aside.add(document)
                continue
            with self.track_time():
                row = self.row(document, source)
                rows[document.metadata["language"]].append(row)
                taken += sum(map(len, row[2:])) + ROW_BYTES
                if taken > self.memory:
                    self.spill(rows, runs, beside)
                    taken = 0
        with self.track_time("task"):
            self.spill(rows, runs, beside)
            bad = self.bad(rank)
            for language, found in sorted(runs.items()):
                if bad:
                    for run in found:
                        self.leave_out(run, bad, tally, aside)
                if len(found) > 1:
                    merge_runs(found, beside / language, self.facts)
                else:
                    move_run(found[0], beside / language)
            shutil.rmtree(beside / "runs", ignore_errors=True)
            aside.close()
            tally.save(beside / "tally.json", read=read)
            beside.rename(final)
        yield from ()

    def row(self, document: Document, source: int) -> Row:
        """What is written of a document."""
        signed = signature(document) if self.facts["signature"].itemsize else b""
        document.metadata.pop("signature", None)
        fields = {"id": document.id, "text": document.text, "metadata": document.metadata}
        line = json.dumps(fields, ensure_ascii=False, sort_keys=True).encode("utf-8") + b"\n"
        keys = paragraphs(document.text) if self.with_paragraphs else b""
        return Row(bytes.fromhex(document.id), source, line, exact_key(document.text), signed, keys)

    def spill(self, rows: dict[str, list[Row]], runs: dict[str, list[Path]], beside: Path) -> None:
        """Write what is in memory."""
        for language, found in rows.items():
            found.sort(key=lambda row: row.id)  # the same page in two archives: the first that came
            runs[language].append(beside / "runs" / f"{language}-{len(runs[language])}")
            write_run(runs[language][-1], found)
        rows.clear()

    def bad(self, rank: int) -> set[int]:
        """The numbers of this task's archives that are bad."""
        path = self.archives / f"{rank:05d}.jsonl"
        found = map(json.loads, path.read_bytes().splitlines()) if path.exists() else ()
        return {row["source"] for row in found if row["bad"]}

    def leave_out(self, run: Path, bad: set[int], tally: Tally, aside: DroppedDocuments) -> None:
        """Drop the documents of bad archives from a run."""

        def kept() -> Iterator[Row]:
            for row in read_run(run, self.facts):
                if row.source in bad:
                    document = document_of(row.line)
                    drop(document, "bad_archive")
                    tally.drop(document)
                    aside.add(document)
                else:
                    yield row

        beside = run.with_name(f"{run.name}-kept")
        write_run(beside, kept())
        move_run(beside, run)


def document_of(line: bytes) -> Document:
    """The document that a line of a run is."""
    row: dict[str, Any] = json.loads(line)
    return Document(text=row["text"], id=row["id"], metadata=row["metadata"])


def collected_languages(folder: Path) -> list[str]:
    """The languages that the tasks before have found."""
    return sorted({path.stem for path in folder.glob("[0-9]*/*.facts") if path.stat().st_size})


def collected_runs(folder: Path, language: str) -> list[Path]:
    """The runs of a language, in the order of the tasks."""
    return [path.with_suffix("") for path in sorted(folder.glob(f"[0-9]*/{language}.facts"))]


def collected_bytes(folder: Path, language: str) -> int:
    """How much the tasks before have found in a language."""
    return sum(path.stat().st_size for path in folder.glob(f"[0-9]*/{language}.jsonl"))
