"""The recipe, run: archives -> documents by language -> shards, by datatrove's executor; finished parts are
not run again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from rich.console import Console

from data_pipelines import report
from data_pipelines.archives import find_archives
from data_pipelines.children import bind_forks
from data_pipelines.config import Recipe, RecipeError
from data_pipelines.progress import shown
from data_pipelines.steps.clean import CleanText
from data_pipelines.steps.collect import CollectDocuments, LoadDocuments, collected_bytes, collected_languages
from data_pipelines.steps.document import write_whole
from data_pipelines.steps.duplicates import DropExactDuplicates, DropNearDuplicates, SignDocuments
from data_pipelines.steps.extract import ExtractText
from data_pipelines.steps.filter import FilterQuality
from data_pipelines.steps.holdout import HoldOut
from data_pipelines.steps.identify import IdentifyLanguage
from data_pipelines.steps.paragraphs import DropRepeatedParagraphs
from data_pipelines.steps.quality import CheckQuality
from data_pipelines.steps.read import ReadArchives
from data_pipelines.steps.refuse import RefusePages
from data_pipelines.steps.write import WriteShards
from xlscale.data.remote import is_url
from xlscale.data.shards import Corpus

PUBLISHED = ("shards", "heldout", "dropped")


def archive_steps(recipe: Recipe, archives: list[str], work: Path) -> list[PipelineStep]:
    """One task per archive: its pages, by language."""
    cfg = recipe
    return [
        ReadArchives(archives, cfg.read, work / "archives", work / "progress"),
        RefusePages(cfg.read.blocklist, cfg.read.robots),
        ExtractText(cfg.extract.timeout_seconds, cfg.extract.memory_mib),
        CleanText(cfg.clean),
        IdentifyLanguage(**vars(cfg.identify)),
        FilterQuality(cfg.filter),
        CheckQuality(cfg.filter.rules, cfg.filter.thresholds),
        SignDocuments(cfg.deduplicate),
        CollectDocuments(work / "documents", cfg.report.dropped_samples),
    ]


def language_steps(recipe: Recipe, languages: list[str], work: Path, source: str) -> list[PipelineStep]:
    """One task per language: its shards."""
    cfg, memory = recipe, recipe.run.sort_memory_mib
    near = DropNearDuplicates(cfg.deduplicate, work / "scratch", memory)
    paragraphs = DropRepeatedParagraphs(cfg.filter.min_characters, work / "scratch", memory)
    return [
        LoadDocuments(work / "documents", languages, work / "progress"),
        DropExactDuplicates(),
        near,
        *([paragraphs] if cfg.deduplicate.paragraphs else []),
        HoldOut(cfg.heldout, cfg.shards.min_documents),
        WriteShards(work, languages, cfg, source, near),
    ]


def run(recipe: Recipe, console: Console) -> dict[str, Any]:
    """Runs what is not finished and returns the report; ValueError for what a person can mend."""
    output = recipe.output
    archives = find_archives(recipe.read)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        inputs = [described(path) for path in archives]
        sizes = [row["bytes"] for row in inputs]
        key = key_of(recipe, inputs)
        finished = finished_report(output, key)
        if finished:
            console.print(f"{output} is up to date: same recipe, same {len(archives)} archives; nothing to do")
            return finished
        refuse_to_overwrite(output)
        work = output / "work" / key[:16]
        for other in (output / "work").glob("*"):
            if other != work:  # of another recipe, never finished
                shutil.rmtree(other)
        if work.exists():
            console.print(f"{output}: going on where an earlier run stopped; finished tasks are not run again")
        if not (work / "report.json").exists():
            execute(recipe, archive_steps(recipe, archives, work), sizes, work, "read", console)
            languages = collected_languages(work / "documents")
            if languages:
                steps = language_steps(recipe, languages, work, f"sha256:{key[:16]}")
                execute(recipe, steps, [collected_bytes(work / "documents", code) for code in languages],
                        work, "write", console)  # fmt: skip
            result = report.build(work, inputs) | {"key": key, "config_hash": recipe.hash}
            if not result["total"]["training"]:
                why = ", ".join(f"{reason} {count}" for reason, count in result["dropped"].items()) or "no pages"
                read = result["total"]["read"]
                raise RecipeError([f"{output}: of {read} documents none is left ({why}); look at the archives"])
            write_whole(work / "report.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        publish(work, output)
        published = finished_report(output, key)
        assert published, "what was published is not what was reported"
        return published


def execute(
    recipe: Recipe, steps: list[PipelineStep], sizes: list[int], work: Path, stage: str, console: Console
) -> None:
    """Runs a stage's unfinished tasks, one per size, with progress; datatrove's own words go to the logs."""
    logs, tasks = work / "logs" / stage, len(sizes)
    logs.mkdir(parents=True, exist_ok=True)
    bind_forks()
    what = {
        "read": f"{tasks} archives: read, extract, identify, filter",
        "write": f"{tasks} languages: deduplicate, write",
    }
    executor = LocalPipelineExecutor(steps, tasks, min(recipe.run.workers, tasks), logging_dir=str(logs))
    with shown(console, work / "progress", stage, what[stage], sum(sizes)), silenced(logs / "console.log"):
        executor.run()


@contextlib.contextmanager
def silenced(path: Path) -> Iterator[None]:
    """Sends standard error, also of child processes, to a file."""
    sys.stderr.flush()
    saved = os.dup(2)
    with path.open("a") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Holds the output folder; RecipeError if another process works there."""
    with (output / ".lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                [f"{output}: another data_pipelines works here; wait for it or give another run.output"]
            ) from None
        yield


def finished_report(output: Path, key: str) -> dict[str, Any] | None:
    """The report of a finished run of the same recipe on the same archives, if its shards are all there."""
    path = output / "report.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text("utf-8"))
    if result["key"] != key:
        return None
    try:
        same = Corpus.open(output / "shards").fingerprint == result["fingerprint"]
    except ValueError:  # a shard is missing or cut short: make them again
        return None
    return result if same else None


def refuse_to_overwrite(output: Path) -> None:
    """Folders that no run of ours has put there are not replaced."""
    ours = (output / "report.json").exists() or (output / "work").exists()
    foreign = [name for name in PUBLISHED if (output / name).exists()]
    if foreign and not ours:
        raise RecipeError([f"{output} has {', '.join(foreign)}, not made by data_pipelines; give another run.output"])


def publish(work: Path, output: Path) -> None:
    """Puts finished folders in the place of older ones, the report last; killed in between it goes on."""
    (output / "report.json").unlink(missing_ok=True)
    for name in PUBLISHED:
        if (work / name).exists():
            shutil.rmtree(output / name, ignore_errors=True)
            (work / name).rename(output / name)
    (work / "report.json").replace(output / "report.json")
    shutil.rmtree(output / "work")


def described(archive: str) -> dict[str, Any]:
    """An archive as it stands in the report; size and digest of a remote one are added by who reads it."""
    if is_url(archive):
        return {"archive": archive, "bytes": 0, "sha256": ""}
    return {"archive": archive, "bytes": Path(archive).stat().st_size, "sha256": digest(archive)}


def key_of(recipe: Recipe, inputs: list[dict[str, Any]]) -> str:
    """What decides the result: the recipe, and the archives by name and digest, remote ones by their address."""
    named = [(Path(row["archive"]).name if row["sha256"] else row["archive"], row["sha256"]) for row in inputs]
    return hashlib.sha256(json.dumps([recipe.hash, named]).encode()).hexdigest()


def digest(path: str) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:  # noqa: PTH123
        return hashlib.file_digest(file, "sha256").hexdigest()
