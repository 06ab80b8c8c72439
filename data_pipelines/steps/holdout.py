"""Hold out: which documents of a language are kept for evaluation, by a hash of their ids; small languages
are dropped.
"""

import hashlib
from collections import deque
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
        waiting: deque[Document] = deque()
        for verdict in drawn(_kept(data, waiting), self.config, self.min_documents):
            while dropped(waiting[0]):
                yield waiting.popleft()
            document = waiting.popleft()
            if verdict == "heldout":
                document.metadata["heldout"] = True
            elif verdict:
                drop(document, verdict)
            yield document
        yield from waiting


def _kept(data: Iterable[Document], waiting: deque[Document]) -> Iterator[str]:
    """The ids of the kept documents; every one that is looked at waits in `waiting`."""
    for document in data:
        waiting.append(document)
        if not dropped(document):
            yield document.id


def drawn(ids: Iterator[str], config: HeldoutConfig, min_documents: int) -> Iterator[str]:
    """For each document of a language, by its id: "heldout", "small_language", or "" for training."""
    head = list(islice(ids, HEAD))
    small = len(head) < min_documents
    wanted = max(config.min_documents, sum(lot(name) < config.fraction for name in head))
    wanted = min(wanted, config.max_documents, max(1, len(head) // 4), len(head) - 1)
    chosen = set(sorted(head, key=lambda name: (lot(name), name))[: max(0, wanted)])
    held = 0
    for name in chain(head, ids):
        late = len(chosen) == config.max_documents or lot(name) >= config.fraction
        out = not small and (name in chosen or (len(head) == HEAD and not late and held < config.max_documents))
        held += out
        yield "small_language" if small else "heldout" if out else ""


def lot(document_id: str) -> float:
    """A number from 0 to 1 that depends on the id alone."""
    return (
        int.from_bytes(hashlib.blake2b(document_id.encode(), digest_size=8, person=b"heldout").digest(), "big") / 2**64
    )
