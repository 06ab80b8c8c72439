"""The stages of a recipe, each one run of an executor over its tasks: archives -> documents by language -> shards.

read     an archive or more a task: its pages, by language and id           documents/<task>/<language>
gather   a part of a language: its documents of all tasks, and columns      gathered/<language>/<part>/
join     a band of a language: which documents have the same hashes         joined/<language>/<band>/
decide   a language: duplicates, paragraphs, held-out documents             decided/<language>/
write    a part of a language: its shards                                   written/<language>/<part>/
verify   a part of a language: its shards read back                         verified/<language>/<part>/

What is a unit of work, and what is decided, depends on the data and the recipe's settings alone. Units are packed
into tasks of about run.task_mib MiB; how many workers there are, or how archives are dealt out, changes no byte.
"""

import json
import math
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from datatrove.pipeline.base import PipelineStep

from data_pipelines.chain import cut, made
from data_pipelines.config import Recipe, RecipeError
from data_pipelines.steps.collect import CollectDocuments, collected_bytes, collected_languages
from data_pipelines.steps.decide import DecideDocuments, LoadDecided
from data_pipelines.steps.duplicates import SignDocuments
from data_pipelines.steps.gather import GatherDocuments, Gathered, JoinKeys
from data_pipelines.steps.read import ReadArchives
from data_pipelines.steps.units import EXACT, Unit, packed
from data_pipelines.steps.verify import VerifyShards, assemble_language, put_aside
from data_pipelines.steps.write import WriteShards
from xlscale.data.remote import is_url


class Stage(NamedTuple):
    """One run of an executor over len(sizes) tasks; a task that is finished is not run again."""

    name: str
    """Of its folder of logs, and of its tasks' files in work/progress: <name>-<task>."""
    title: str
    steps: list[PipelineStep]
    sizes: list[int]
    """Of each task: bytes of its input, as its progress counts them; 0 = not known."""


def stages(recipe: Recipe, archives: list[str], work: Path) -> Iterator[Stage]:
    """The stages in their order; each is made when those before it are done, for it needs to know what they found."""
    yield read_stage(recipe, archives, work)
    refuse_bad_archives(recipe, work)
    documents, gathered, joined, decided, written, verified = (
        work / name for name in ("documents", "gathered", "joined", "decided", "written", "verified")
    )
    progress, asked, room = work / "progress", cut(recipe.steps), int(recipe.run.task_mib * 2**20)
    languages = collected_languages(documents)
    if not languages:
        return

    sizes = {code: collected_bytes(documents, code) for code in languages}
    parts = {code: math.ceil(size / (recipe.shards.part_mib * 2**20)) for code, size in sizes.items()}
    tasks = packed((Unit(code, f"{part:05d}", sizes[code] // parts[code])
                    for code in languages for part in range(parts[code])), room)  # fmt: skip
    gather = GatherDocuments(gathered, tasks, progress, documents, parts, asked.corpus, recipe.deduplicate)
    yield stage("gather", f"{len(languages)} languages: sort by id", [gather], tasks)

    totals = {code: Gathered(gathered / code).total for code in languages}
    keys = [EXACT] if "exact" in asked.corpus else []
    keys += range(recipe.deduplicate.bands) if "near" in asked.corpus else []
    if keys:
        tasks = packed(join_units(totals, len(keys), room), room)
        join = JoinKeys(joined, tasks, progress, gathered, keys, recipe.run.sort_memory_mib)
        yield stage("join", f"{len(keys)} keys of each: find equal ones", [join], tasks)

    row = 4 * recipe.deduplicate.bands * (recipe.deduplicate.rows + 1)
    tasks = packed((Unit(code, size=row * totals[code]) for code in languages), room)
    decide = DecideDocuments(decided, tasks, progress, gathered, joined, recipe)
    yield stage("decide", f"{sum(totals.values())} documents: deduplicate, hold out", [decide], tasks)

    units = [Unit(code, part.name, (part / "documents.jsonl").stat().st_size)
             for code in languages for part in Gathered(gathered / code).parts]  # fmt: skip
    tasks = packed(units, room)
    steps = [
        LoadDecided(gathered, decided, written, tasks, progress),
        *made(asked.kept, recipe),
        WriteShards(written, tasks, recipe, f"sha256:{work.name}"),
    ]
    yield stage("write", f"{len(units)} parts: write shards", steps, tasks)

    verify = VerifyShards(verified, tasks, progress, written)
    yield stage("verify", f"{len(units)} parts: read back", [verify], tasks)


def read_stage(recipe: Recipe, archives: list[str], work: Path) -> Stage:
    """From archives to documents by language."""
    # Blocks as even as can be, as ReadArchives deals them out.
    tasks = math.ceil(len(archives) / recipe.read.archives_per_task)
    bounds = [len(archives) * task // tasks for task in range(tasks + 1)]
    sizes = [0 if is_url(archive) else Path(archive).stat().st_size for archive in archives]
    asked = cut(recipe.steps)
    steps = [
        ReadArchives(archives, recipe.read, work / "archives", work / "progress"),
        *made(asked.pages, recipe),
        *([SignDocuments(recipe.deduplicate)] if "near" in asked.corpus else []),
        CollectDocuments(work / "documents", work / "archives", asked.corpus, recipe.deduplicate, recipe.report,
                         recipe.run.sort_memory_mib),
    ]  # fmt: skip
    title = f"{len(archives)} archives: read, extract, identify, filter"
    return Stage("read", title, steps, [sum(sizes[a:b]) for a, b in pairwise(bounds)])


def join_units(totals: dict[str, int], keys: int, room: int) -> Iterator[Unit]:
    """Some keys of a language with so many documents: as many as make a task."""
    for code, total in totals.items():
        some = max(1, room // (8 * total))
        for begin in range(0, keys, some):
            end = min(begin + some, keys)
            yield Unit(code, f"{begin}-{end}", 8 * total * (end - begin))


def stage(name: str, title: str, steps: list[PipelineStep], tasks: list[list[Unit]]) -> Stage:
    """A stage of units."""
    return Stage(name, title, steps, [sum(unit.size for unit in units) for units in tasks])


def refuse_bad_archives(recipe: Recipe, work: Path) -> None:
    """RecipeError if more archives are damaged beyond their budget than the recipe allows, or all of them."""
    rows = [json.loads(line) for path in sorted((work / "archives").glob("*.jsonl")) for line in path.open("rb")]
    bad = [row["bad"] for row in rows if row["bad"]]
    allowed = max(1, int(recipe.read.max_bad_archives * len(rows)))
    if bad and len(bad) == len(rows):
        raise RecipeError(bad)
    if len(bad) > allowed:
        share = f"read.max_bad_archives = {recipe.read.max_bad_archives} allows {allowed}"
        raise RecipeError([*bad, f"{len(bad)} of {len(rows)} archives are bad, {share}; mend them, or raise it"])


def assemble(recipe: Recipe, work: Path) -> None:
    """Puts what the stages have made together: work/shards, heldout, dropped, tallies; killed in between it begins
    anew, which takes moments: files are linked.
    """
    for name in ("shards", "heldout", "dropped", "tallies"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "tallies").mkdir()
    for folder in sorted((work / "documents").glob("[0-9]*")):
        put_aside(folder, work, f"read-{folder.name}")
    for folder in sorted((work / "written").glob("*")):
        assemble_language(folder.name, work / "written", work / "verified", work, recipe)
