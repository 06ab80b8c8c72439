"""The recipe, run: archives -> documents by language -> shards, by datatrove's executor; finished parts are
not run again.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from data_pipelines import executors, report
from data_pipelines.archives import described, find_archives
from data_pipelines.config import Recipe, RecipeError
from data_pipelines.page import write_page
from data_pipelines.stages import assemble, stages
from data_pipelines.steps.document import write_whole
from xlscale.data.shards import Corpus

PUBLISHED = ("shards", "heldout", "dropped")


def run(recipe: Recipe, console: Console, dry_run: bool = False) -> dict[str, Any] | None:
    """Runs what is not finished and returns the report; ValueError for what a person can mend.

    `dry_run`: says what it would run first, and returns None.
    """
    output = recipe.output.resolve()  # for workers on other machines
    executors.check(recipe, dry_run)
    archives = find_archives(recipe.read)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output):
        inputs = described(archives, output / "digests.json")
        key = key_of(recipe, inputs)
        finished = finished_report(output, key)
        if finished:
            console.print(f"{output} is up to date: same recipe, same {len(archives)} archives; nothing to do")
            write_page(output)
            return finished
        refuse_to_overwrite(output)
        work = output / "work" / key[:16]
        prepare(recipe, work, console)
        if not (work / "report.json").exists():
            with contextlib.nullcontext() if dry_run else executors.cluster(recipe, work):
                for stage in stages(recipe, archives, work):
                    if not executors.run_stage(recipe, stage, work, console, dry_run):
                        return None
            assemble(recipe, work)
            result = report.build(recipe, work, inputs) | {"key": key, "config_hash": recipe.hash}
            if not result["total"]["training"]:
                why = ", ".join(f"{reason} {count}" for reason, count in result["dropped"].items()) or "no pages"
                read = result["total"]["read"]
                raise RecipeError([f"{output}: of {read} documents none is left ({why}); look at the archives"])
            write_whole(work / "report.json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")
        publish(work, output)
        published = finished_report(output, key)
        assert published, "what was published is not what was reported"
        write_page(output)
        return published


def prepare(recipe: Recipe, work: Path, console: Console) -> None:
    """The work folder: an earlier run's goes on if it cut the work into the same tasks; others' go away."""
    plan = work / "plan.json"
    tasks = json.dumps({"archives_per_task": recipe.read.archives_per_task, "task_mib": recipe.run.task_mib})
    same = (work / "report.json").exists() or (plan.exists() and plan.read_text() == tasks)
    for other in work.parent.glob("*"):
        if other != work or not same:
            shutil.rmtree(other)
    if work.exists():
        console.print(f"{recipe.output}: going on where an earlier run stopped; finished tasks are not run again")
    else:
        write_whole(plan, tasks)


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


def key_of(recipe: Recipe, inputs: list[dict[str, Any]]) -> str:
    """What decides the result: the recipe, and the archives by name and digest, remote ones by their address."""
    named = [(Path(row["archive"]).name if row["sha256"] else row["archive"], row["sha256"]) for row in inputs]
    return hashlib.sha256(json.dumps([recipe.hash, named]).encode()).hexdigest()
