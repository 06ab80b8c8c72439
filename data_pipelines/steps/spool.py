"""Steps that must have seen all documents of a stream before they decide about one: these wait in a file."""

import contextlib
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.steps.columns import mapped, scratch
from data_pipelines.steps.document import dropped


class Spool:
    """Documents that wait in a file until all have been seen."""

    def __init__(self, path: Path):
        self._file = path.open("w+", encoding="utf-8")

    def add(self, document: Document) -> None:
        """Put it at the end."""
        self._file.write(json.dumps([document.text, document.id, document.metadata], ensure_ascii=False) + "\n")

    def read(self) -> Iterator[Document]:
        """All that were added, in their order."""
        self._file.seek(0)
        for line in self._file:
            text, name, metadata = json.loads(line)
            yield Document(text=text, id=name, metadata=metadata)

    def close(self) -> None:
        """Let the file go."""
        self._file.close()


class SpooledStep(PipelineStep):
    """Notes columns of the documents that come and are kept, decides by them, and marks the documents.

    The decisions are functions of columns (steps/join.py, paragraphs.py) that the stages of a recipe use too
    (steps/decide.py); this is for streams of any other pipeline. On the heap is what `memory_mib` allows to sort.
    """

    type = "xlscale"
    columns: ClassVar[Sequence[str]]
    """Names of the files that facts() fills."""

    def __init__(self, folder: Path | None = None, memory_mib: int = 256):
        super().__init__()
        self.folder, self.memory = folder, memory_mib * 2**20

    @abstractmethod
    def facts(self, document: Document) -> Sequence[bytes]:
        """What is added to each of the columns for a document."""

    @abstractmethod
    def decide(self, folder: Path, total: int) -> None:
        """Decide by the columns of `total` documents in a folder, which may get more files."""

    @abstractmethod
    def mark(self, document: Document, place: int) -> None:
        """Tell a document, by its place among those kept, what was decided."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        name = f"{self.name}-{rank:05d}"
        with scratch(self.folder, name) as folder, contextlib.closing(Spool(folder / "text")) as spool:
            total = end = 0
            with contextlib.ExitStack() as stack:
                files = [stack.enter_context((folder / c).open("wb")) for c in ("names", "ends", *self.columns)]
                for document in data:
                    with self.track_time():
                        if not dropped(document):
                            encoded = document.id.encode("utf-8")
                            end += len(encoded)
                            total += 1
                            facts = (encoded, end.to_bytes(8, "little"), *self.facts(document))
                            for file, fact in zip(files, facts, strict=True):
                                file.write(fact)
                        spool.add(document)
            self._names, self._ends = mapped(folder / "names", np.uint8), mapped(folder / "ends", "<u8")
            with self.track_time("task"):
                self.decide(folder, total)
            place = 0
            for document in spool.read():
                if not dropped(document):
                    self.mark(document, place)
                    place += 1
                yield document

    def id_at(self, place: int) -> str:
        """The id of a document kept before this step."""
        begin = int(self._ends[place - 1]) if place else 0
        return self._names[begin : int(self._ends[place])].tobytes().decode("utf-8")
