"""Verify: the shards of a part read back; then the parts of a language put together."""

import hashlib
import json
import shutil
from pathlib import Path

from datatrove.data import Document

from data_pipelines.config import Recipe
from data_pipelines.steps.aside import DroppedDocuments
from data_pipelines.steps.collect import document_of
from data_pipelines.steps.document import drop, write_lines
from data_pipelines.steps.filter import is_shorter
from data_pipelines.steps.tally import Tally
from data_pipelines.steps.units import Unit, UnitStep
from data_pipelines.steps.write import shard_row
from xlscale.data.shard_writer import join_shards, link
from xlscale.data.shards import Corpus

TRACE = 40  # weighted characters from which a line that stands in training is taken out of a held-out document
TRACE_BYTES = 12


class VerifyShards(UnitStep):
    """Reads the shards of each part back, with all their checks, against the digest of the ids that were written.

    Writes to `seen` the traces of those lines of the language's held-out documents, of all parts, that are long lines
    of training documents. In memory are these traces, of at most heldout.max_documents, and one document.
    """

    name = "verify"

    def __init__(self, folder: Path, tasks: list[list[Unit]], progress: Path, written: Path):
        super().__init__(folder, tasks, progress)
        self.written = written

    def make(self, unit: Unit, folder: Path) -> None:
        language, written = unit.language, self.written / unit.path
        heldout = heldout_documents(self.written, language)
        names = {document.id for document in heldout}
        traces = {trace(line) for document in heldout for line in document.text.split("\n")}
        ids, seen = hashlib.sha256(), set[bytes]()
        if (written / language).exists():
            for document in Corpus.open(written, [language]).read(language):
                assert document["id"] not in names, f"{language}: {document['id']} is in training and held out"
                ids.update(document["id"].encode())
                seen |= traces & {trace(line) for line in document["text"].split("\n") if not is_shorter(line, TRACE)}
        if ids.hexdigest() != json.loads((written / "tally.json").read_text("utf-8"))["ids"]:
            raise OSError(f"{written}: the shards do not read back as they were written; check the disk")
        (folder / "seen").write_bytes(b"".join(sorted(seen)))


def heldout_documents(written: Path, language: str) -> list[Document]:
    """The held-out documents of a language, of all its parts."""
    paths = sorted((written / language).glob("[0-9]*/heldout.jsonl"))
    return [document_of(line) for path in paths for line in path.open("rb")]


def assemble_language(language: str, written: Path, verified: Path, work: Path, recipe: Recipe) -> None:
    """Puts the parts of a language together in `work`: shards/, heldout/, dropped/, tallies/."""
    parts = sorted((written / language).glob("[0-9]*"))
    folders = [part / language for part in parts if (part / language).exists()]
    if folders:
        join_shards(folders, work / "shards" / language)
    seen = {
        content[i : i + TRACE_BYTES]
        for path in (verified / language).glob("[0-9]*/seen")
        for content in [path.read_bytes()]
        for i in range(0, len(content), TRACE_BYTES)
    }
    tally, aside = Tally(recipe.report), DroppedDocuments.of(written / language, recipe.report)
    kept = []
    for document in heldout_documents(written, language):
        # What stands in training is no test of it.
        document.text = "\n".join(line for line in document.text.split("\n") if trace(line) not in seen).strip()
        if is_shorter(document.text, recipe.filter.min_characters):
            drop(document, "seen_in_training")
            tally.drop(document)
            aside.add(document)
        else:
            tally.keep(document, "heldout")
            kept.append(document)
    aside.close()
    if folders or kept:
        write_lines(work / "heldout" / f"{language}.jsonl", map(shard_row, kept))
    if tally.counts:
        tally.save(work / "tallies" / f"{language}-heldout.json")
    for part in parts:
        shutil.copyfile(part / "tally.json", work / "tallies" / f"{language}-{part.name}.json")
        put_aside(part, work, f"{language}-{part.name}")
    put_aside(written / language, work, f"{language}-heldout")


def put_aside(folder: Path, work: Path, name: str) -> None:
    """Links the files of DroppedDocuments in a folder to work/dropped/<reason>/<name>.jsonl.zst."""
    for path in (folder / "dropped").glob("*.jsonl.zst"):
        to = work / "dropped" / path.name.removesuffix(".jsonl.zst") / f"{name}.jsonl.zst"
        to.parent.mkdir(parents=True, exist_ok=True)
        link(path, to)


def trace(line: str) -> bytes:
    """TRACE_BYTES by which a line is known again."""
    return hashlib.blake2b(line.encode("utf-8"), digest_size=TRACE_BYTES).digest()
