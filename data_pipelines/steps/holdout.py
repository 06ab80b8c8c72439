"""Hold out: which documents of a language are kept for evaluation, by a hash of their ids; small languages
are dropped.
"""

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from data_pipelines.config import HeldoutConfig
from data_pipelines.steps.document import drop, dropped

# Documents looked at together: in a language with more, a hash alone holds out enough, so the rest can stream
# by.
HEAD = 4096


class HoldOut(PipelineStep):
    """Sets metadata["heldout"] on the documents that are not for training."""

    type, name = "xlscale", "holdout"

    def __init__(self, config: HeldoutConfig, min_documents: int):
        super().__init__()
        self.config, self.min_documents = config, min_documents

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        waiting: list[Document] = []
        head = list(islice(self._kept(data, waiting), HEAD))
        small = len(head) < self.min_documents
        wanted = max(self.config.min_documents, sum(lot(d.id) < self.config.fraction for d in head))
        wanted = min(wanted, self.config.max_documents, max(1, len(head) // 4), len(head) - 1)
        chosen = {d.id for d in sorted(head, key=lambda d: (lot(d.id), d.id))[: max(0, wanted)]}
        held = 0
        for document in chain(waiting, data):
            if not dropped(document):
                if small:
                    drop(document, "small_language")
                late = len(chosen) == self.config.max_documents or lot(document.id) >= self.config.fraction
                if document.id in chosen or (len(head) == HEAD and not late and held < self.config.max_documents):
                    document.metadata["heldout"] = True
                    held += 1
            yield document

    @staticmethod
    def _kept(data: Iterable[Document], waiting: list[Document]) -> Iterator[Document]:
        """The kept documents; every one that is looked at waits in `waiting`."""
        for document in data:
            waiting.append(document)
            if not dropped(document):
                yield document


def lot(document_id: str) -> float:
    """A number from 0 to 1 that depends on the id alone."""
    return (
        int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8, person=b"heldout").digest(), "big") / 2**64
    )
