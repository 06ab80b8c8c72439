"""What all steps share: how a document is dropped, and a step that looks at one document at a time."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from datatrove.data import Document, DocumentsPipeline
from datatrove.pipeline.base import PipelineStep

from xlscale.data.shards import write_atomically

# Every reason for which a document is dropped, by the step that does it, with what it means; both in their order.
REASONS: dict[str, dict[str, str]] = {
    "read": {
        "not_ok": "the server's answer was not 200",
        "not_html": "the server sent something else than HTML or text",
        "too_large": "longer than read.max_page_bytes",
        "broken_body": "its body is not in the encoding that its headers say (gzip, chunked, ...)",
        "bad_archive": "its archive has more damaged places than read.max_faults",
    },
    "refuse": {
        "blocked": "its address is in read.blocklist",
        "robots": "its robots tag or header says what is in read.robots",
    },
    "extract": {
        "extract_timeout": "extraction took longer than extract.timeout_seconds",
        "extract_crashed": "extraction ended in an error or ran out of extract.memory_mib",
        "empty": "no text in the page",
    },
    "identify": {
        "language_uncertain": "the identifiers disagree and none is sure, or the model is not (identify.thresholds)",
        "language_unsupported": "a language that XLM-R does not have",
        "language_unwanted": "a language that is not in identify.languages",
    },
    "filter": {
        "too_short": "fewer letters than filter.min_characters",
        "too_long": "more characters than filter.max_characters",
        "too_few_letters": "mostly digits, signs and symbols",
        "duplicate_lines": "repeats its own lines",
        "short_lines": "menus, tables and lists rather than sentences",
        "code": "mostly program code or markup",
    },
    "quality": {
        "gopher_few_words": "fewer words than min_words (Gopher)",
        "gopher_many_words": "more words than max_words (Gopher)",
        "gopher_short_words": "words shorter on average than min_mean_word (Gopher)",
        "gopher_long_words": "words longer on average than max_mean_word (Gopher)",
        "gopher_hashes": "many hash signs (Gopher)",
        "gopher_ellipses": "many ellipses (Gopher)",
        "gopher_bullets": "nearly all lines start with a bullet (Gopher)",
        "gopher_ellipsis_lines": "many lines end with an ellipsis (Gopher)",
        "gopher_not_alphabetic": "many words without a letter (Gopher)",
        "gopher_stop_words": "none or one of the language's most frequent words (Gopher)",
        "gopher_repeated_lines": "repeats its own lines (Gopher)",
        "gopher_repeated_paragraphs": "repeats its own paragraphs (Gopher)",
        "gopher_top_gram": "two to four words make up much of it (Gopher)",
        "gopher_repeated_grams": "repeats runs of five to ten words (Gopher)",
        "c4_no_lines": "no line of it is a sentence (C4)",
        "c4_lorem_ipsum": "has the printers' dummy text (C4)",
        "c4_curly_bracket": "has a curly bracket, as program code does (C4)",
        "c4_few_sentences": "fewer ends of sentences than min_sentences (C4)",
        "mc4_few_long_lines": "fewer lines of 200 letters than min_long_lines (mC4)",
        "fineweb_ended_lines": "few lines end as a sentence does (FineWeb)",
        "fineweb_short_lines": "many lines of 30 letters or fewer (FineWeb)",
        "fineweb_duplicate_lines": "some lines stand twice (FineWeb)",
        "fineweb_line_breaks": "many line breaks for its words: lists (FineWeb)",
    },
    "perplexity": {
        "perplexity_head": "most like the text of its language's model (perplexity.keep)",
        "perplexity_middle": "in the middle, to its language's model (perplexity.keep)",
        "perplexity_tail": "least like the text of its language's model (perplexity.keep)",
    },
    "exact": {
        "exact_duplicate": "the text of another page, to the letter",
    },
    "near": {
        "near_duplicate": "almost the text of another page (deduplicate.min_similarity)",
    },
    "paragraphs": {
        "repeated_paragraphs": "too little is left without the paragraphs of other pages (deduplicate.paragraphs)",
    },
    "hold_out": {
        "small_language": "fewer documents in its language than shards.min_documents",
    },
    "verify": {
        "seen_in_training": "held out, but its lines stand in training pages",
    },
}


def drop(document: Document, reason: str) -> None:
    """Mark a document as dropped; the first reason stays."""
    assert any(reason in reasons for reasons in REASONS.values()), reason
    document.metadata.setdefault("dropped", reason)


def dropped(document: Document) -> bool:
    """Whether a step before dropped it."""
    return "dropped" in document.metadata


class DocumentStep(PipelineStep):
    """A step that looks at each document that is still kept, by itself."""

    type = "xlscale"
    reasons: ClassVar[dict[str, str]] = {}
    """Of a step of the user's: why it drops documents, reason -> what it means."""

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
    write_atomically(path, text.encode("utf-8"))
