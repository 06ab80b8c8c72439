"""Write: the shards of one part of a language by xlscale.data, and its held-out documents beside them."""

import hashlib
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.config import Recipe
from data_pipelines.steps.aside import DroppedDocuments
from data_pipelines.steps.document import dropped, write_lines
from data_pipelines.steps.tally import Tally
from data_pipelines.steps.units import Unit, begin
from xlscale.data.shard_writer import ShardWriter

# Of a document's metadata, kept in the shards; the last two where its language has a model of perplexity and where
# there were near duplicates of it.
FIELDS = ("url", "archive", "offset", "bucket", "cluster_size")


class WriteShards(PipelineStep):
    """Writes the documents of each of its task's parts, which come one after the other, by metadata["unit"].

    `folder`/<unit>/: <language>/ with the shards, heldout.jsonl, tally.json, ids (their digest); all or nothing.
    """

    type, name = "xlscale", "write"

    def __init__(self, folder: Path, tasks: list[list[Unit]], recipe: Recipe, source: str):
        super().__init__()
        self.folder, self.tasks, self.source = folder, tasks, source
        self.shards, self.report, self.config_hash = recipe.shards, recipe.report, recipe.hash

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        units = self.tasks[rank]
        for number, documents in groupby(data, key=lambda document: document.metadata.pop("unit")):
            self.write(units[number], documents)
        for unit in units:
            if not (self.folder / unit.path).exists():  # a part without a document
                self.write(unit, ())
        yield from ()

    def write(self, unit: Unit, documents: Iterable[Document]) -> None:
        """Write one part."""
        beside = begin(self.folder, unit)
        tally, aside = Tally(self.report), DroppedDocuments.of(beside, self.report)
        heldout, ids = list[dict[str, Any]](), hashlib.sha256()
        settings = self.shards.documents_per_chunk, self.shards.chunks_per_shard, self.shards.compression
        writer = None
        for document in documents:
            if dropped(document):
                tally.drop(document)
                aside.add(document)
            elif document.metadata.get("heldout"):
                heldout.append({"id": document.id, "text": document.text, "metadata": document.metadata})
            else:
                with self.track_time():
                    writer = writer or ShardWriter(beside, unit.language, self.source, self.config_hash, *settings)
                    writer.write(shard_row(document))
                    ids.update(document.id.encode())
                    tally.keep(document, "training")
        with self.track_time("task"):
            if writer:
                writer.close()
            aside.close()
            if heldout:
                write_lines(beside / "heldout.jsonl", heldout)
            tally.save(beside / "tally.json", ids=ids.hexdigest())
            beside.rename(self.folder / unit.path)


def shard_row(document: Document) -> dict[str, object]:
    """A document as it stands in the shards."""
    facts = {key: document.metadata[key] for key in FIELDS if key in document.metadata}
    return {"id": document.id, "text": document.text, **facts}


def read_heldout(path: Path) -> list[str]:
    """The texts of a held-out file."""
    return [json.loads(line)["text"] for line in path.read_bytes().splitlines()]
