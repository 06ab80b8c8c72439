"""`python -m data_pipelines step`: one step of a recipe by itself, on the documents of a jsonl file."""

import contextlib
import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

import zstandard
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_pipelines.chain import PAGES, made
from data_pipelines.config import Recipe, RecipeError
from data_pipelines.steps.document import document_id
from data_pipelines.steps.duplicates import DropExactDuplicates, DropNearDuplicates, SignDocuments
from data_pipelines.steps.holdout import HoldOut
from data_pipelines.steps.paragraphs import DropRepeatedParagraphs

# Steps that look at all documents of a language.
CORPUS: dict[str, Callable[[Recipe], list[PipelineStep]]] = {
    "exact": lambda recipe: [DropExactDuplicates()],
    "near": lambda recipe: [
        SignDocuments(recipe.deduplicate),
        DropNearDuplicates(recipe.deduplicate, memory_mib=recipe.run.sort_memory_mib),
    ],
    "paragraphs": lambda recipe: [
        DropRepeatedParagraphs(recipe.filter.min_characters, memory_mib=recipe.run.sort_memory_mib)
    ],
    "hold_out": lambda recipe: [HoldOut(recipe.heldout, recipe.shards.min_documents)],
}


def run(name: str, recipe: Recipe, source: str, kept: str, refused: str | None) -> str:
    """Runs the step on the documents of `source`, writes those it keeps and those it drops; says how many.

    A document is an object with `text` (or `html`, for extract); other keys are its metadata, which steps read and
    set: `language`, `heldout`, `duplicate_of`, `dropped` (the reason).
    """
    if not Path(source).is_file():
        raise RecipeError([f"--input {source}: is no file (from {Path.cwd()})"])
    if name not in PAGES and name not in CORPUS and ":" not in name:
        raise RecipeError([f"step {name!r} is none that works alone; there are {', '.join([*PAGES, *CORPUS])} and "
                           "file.py:Class"])  # fmt: skip
    steps = CORPUS[name](recipe) if name in CORPUS else made([name], recipe)
    data = documents(source)
    for step in steps:
        data = step.run(data)
    counts: Counter[str] = Counter()
    with contextlib.ExitStack() as files:
        keep = files.enter_context(written(kept))
        drop = files.enter_context(written(refused)) if refused else None
        try:
            for document in data:
                reason = document.metadata.get("dropped", "")
                counts[reason] += 1
                if reason and drop:
                    drop.write(row(document))
                elif not reason:
                    keep.write(row(document))
        except KeyError as error:
            raise RecipeError([f"--input {source}: a document has no {error}, which {name} needs; run the step that "
                               "sets it first"]) from error  # fmt: skip
    why = ", ".join(f"{reason} {count}" for reason, count in counts.most_common() if reason)
    return f"{name}: {counts.total()} documents, {counts['']} kept, dropped: {why or 'none'}"


def documents(path: str) -> Iterator[Document]:
    """The documents of a jsonl file; RecipeError for a line that is none."""
    with opened(path, "r") as file:
        for number, line in enumerate(_unpacked(file, path), 1):
            try:
                fields = json.loads(line)
                text = fields.pop("text", "")
                html = fields.pop("html", None)
                if not isinstance(text, str) or not isinstance(html, str | None):
                    raise TypeError("text is no string")
            except (ValueError, TypeError, AttributeError) as error:
                raise RecipeError([f"--input {path}: line {number} is no document ({error}); a line is an object "
                                   "with `text`"]) from None  # fmt: skip
            if html is not None:
                fields |= {"payload": html.encode("utf-8", "replace"), "charset": "utf-8"}
            content = fields.get("payload", text.encode("utf-8", "replace"))
            name = fields.pop("id", None) or document_id(fields.get("url", ""), content)
            fields.pop("dropped", None)  # by a step before: this one decides anew
            yield Document(text=text, id=str(name), metadata=fields)


def _unpacked(file: IO[str], path: str) -> Iterator[str]:
    try:
        yield from file
    except (EOFError, zlib.error, zstandard.ZstdError, UnicodeDecodeError, gzip.BadGzipFile) as error:
        raise RecipeError([f"--input {path}: cannot be unpacked ({error}); make it anew"]) from None


def row(document: Document) -> str:
    """A document as a line; what only steps beside it read is left out."""
    facts = {key: value for key, value in document.metadata.items() if key not in ("payload", "signature")}
    return json.dumps({"id": document.id, "text": document.text, **facts}, ensure_ascii=False) + "\n"


@contextlib.contextmanager
def written(path: str) -> Iterator[IO[Any]]:
    """A new file, whole or not there."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    beside = final.with_name(f".{os.getpid()}.{final.name}")
    try:
        with opened(str(beside), "w") as file:
            yield file
        beside.replace(final)
    finally:
        beside.unlink(missing_ok=True)


def opened(path: str, mode: Literal["r", "w"]) -> Any:
    """A text file, packed as its name says."""
    if path.endswith(".gz"):
        return gzip.open(path, f"{mode}t", encoding="utf-8")
    if path.endswith(".zst"):
        return zstandard.open(path, f"{mode}t", encoding="utf-8")
    return Path(path).open(mode, encoding="utf-8")
