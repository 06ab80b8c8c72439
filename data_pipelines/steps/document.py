"""What all steps share: how a document is dropped, and a step that looks at one document at a time."""

import hashlib
import json
import os
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

# Every reason for which a document is dropped, in the order of the steps.
REASONS = {
    "not_ok": "the server's answer was not 200",
    "not_html": "the server sent something else than HTML or text",
    "too_large": "longer than read.max_page_bytes",
    "extract_timeout": "extraction took longer than extract.timeout_seconds",
    "extract_crashed": "extraction ended in an error or ran out of extract.memory_mib",
    "empty": "no text in the page",
    "language_uncertain": "the two identifiers disagree and neither is sure",
    "language_unsupported": "a language that XLM-R does not have",
    "language_unwanted": "a language that is not in identify.languages",
    "too_short": "fewer letters than filter.min_characters",
    "too_long": "more characters than filter.max_characters",
    "too_few_letters": "mostly digits, signs and symbols",
    "duplicate_lines": "repeats its own lines",
    "short_lines": "menus, tables and lists rather than sentences",
    "code": "mostly program code or markup",
    "exact_duplicate": "the text of another page, to the letter",
    "near_duplicate": "almost the text of another page (deduplicate.min_similarity)",
    "small_language": "fewer documents in its language than shards.min_documents",
    "seen_in_training": "held out, but its lines stand in training pages",
}


def drop(document: Document, reason: str) -> None:
    """Mark a document as dropped; the first reason stays."""
    assert reason in REASONS, reason
    document.metadata.setdefault("dropped", reason)


def dropped(document: Document) -> bool:
    """Whether a step before dropped it."""
    return "dropped" in document.metadata


class DocumentStep(PipelineStep):
    """A step that looks at each document that is still kept, by itself."""

    type = "xlscale"

    @abstractmethod
    def process(self, document: Document) -> None:
        """Change the document in place, or drop() it."""

    def run(self, data: DocumentsPipeline, rank: int = 0, world_size: int = 1) -> DocumentsPipeline:
        for document in data:
            if not dropped(document):
                with self.track_time():
                    self.process(document)
            yield document


def document_id(url: str, payload: bytes) -> str:
    """A document's id: of its address and content alone, so it is the same in whatever archive it comes."""
    return hashlib.blake2b(url.encode("utf-8", "replace") + b"\n" + payload, digest_size=16).hexdigest()


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A jsonl file, whole or not there."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """A text file, whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
