"""Where a stage runs: datatrove's executors on this machine, on Slurm or on Ray."""

import contextlib
import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor
from rich.console import Console

from data_pipelines.children import bind_forks
from data_pipelines.config import Recipe, RecipeError
from data_pipelines.progress import shown
from data_pipelines.slurm import SOURCE, Slurm, WrittenError, job_name, queued, slurm_executor
from data_pipelines.stages import Stage
from data_pipelines.tasks import Task, WorkerDiedError, await_orphans, noticed_deaths, refuse_failed


class _Local(Task, LocalPipelineExecutor):
    reraise = False  # an error would end the tasks beside it


class _Ray(Task, RayPipelineExecutor):
    pass


def _local(recipe: Recipe, stage: Stage, logs: Path) -> _Local:
    tasks = len(stage.sizes)
    return _Local(stage.steps, tasks, min(recipe.run.workers, tasks), logging_dir=str(logs))


def _ray(recipe: Recipe, stage: Stage, logs: Path) -> _Ray:
    settings = {"logging_dir": str(logs), "mem_per_cpu_gb": recipe.ray.memory_gib}
    return _Ray(stage.steps, len(stage.sizes), recipe.run.workers, **settings)


EXECUTORS: dict[str, Callable[[Recipe, Stage, Path], _Local | Slurm | _Ray]] = {
    "local": _local,
    "slurm": slurm_executor,
    "ray": _ray,
}


def check(recipe: Recipe, dry_run: bool) -> None:
    """RecipeError if what the executor needs is not here."""
    if recipe.run.executor == "ray" and not find_spec("ray"):
        raise RecipeError(["run.executor = 'ray' needs the package ray: pip install 'xlscale[ray]'"])
    missing = [command for command in ("sbatch", "squeue") if not shutil.which(command)]
    if recipe.run.executor == "slurm" and missing and not dry_run:
        raise RecipeError([f"run.executor = 'slurm': there is no {' and no '.join(missing)} on the PATH; start the "
                           "command where jobs are submitted, or look at them with --dry-run"])  # fmt: skip


def run_stage(recipe: Recipe, stage: Stage, work: Path, console: Console, dry_run: bool) -> bool:
    """Runs a stage's unfinished tasks with progress; datatrove's own words go to the logs.

    RecipeError tells the first task that failed. False: there is something to do, and `dry_run` has told it.
    """
    logs, tasks = work / "logs" / stage.name, len(stage.sizes)
    logs.mkdir(parents=True, exist_ok=True)
    _refuse_two_executors(recipe, logs)
    with silenced(logs / "console.log"):
        executor = EXECUTORS[recipe.run.executor](recipe, stage, logs)
    left = executor.get_incomplete_ranks()
    if dry_run and left:
        told = f"{stage.name}: {len(left)} of {tasks} tasks to run, {recipe.run.workers} at once"
        console.print(f"{told}, on {recipe.run.executor}")
        if isinstance(executor, Slurm):
            executor.dry_run = True
            with contextlib.suppress(WrittenError), silenced(logs / "console.log"):
                executor.launch_job()
            console.print((logs / "launch_script.slurm").read_text(), markup=False, soft_wrap=True)
        return False
    if not left:
        return True
    await_orphans(logs)
    bind_forks()
    try:
        with (
            shown(console, work / "progress", stage.name, stage.title, sum(stage.sizes)),
            silenced(logs / "console.log"),
            noticed_deaths(logs),
        ):
            executor.run()
    except WorkerDiedError:
        pass
    except subprocess.CalledProcessError as error:
        words = (logs / "console.log").read_text("utf-8", "replace").strip().splitlines()[-1:]
        raise RecipeError([f"{stage.name}: sbatch refused {logs / 'launch_script.slurm'} ({' '.join(words)}); mend "
                           f"[slurm] in the recipe"]) from error  # fmt: skip
    except KeyboardInterrupt:
        if recipe.run.executor == "slurm":
            console.print(f"the jobs stay in Slurm's queue; `scancel --name={job_name(logs)}` ends them")
        raise
    refuse_failed(stage, executor.get_incomplete_ranks(), logs)
    return True


def _refuse_two_executors(recipe: Recipe, logs: Path) -> None:
    """Jobs of a command that was interrupted go on in Slurm: nobody else may do their tasks."""
    there = recipe.run.executor != "slurm" and (logs / "ranks_to_run.json").exists() and shutil.which("squeue")
    if there and queued(job_name(logs)):
        raise RecipeError([f"{logs}: Slurm still runs tasks of this stage; go on with --executor slurm, or end them: "
                           f"scancel --name={job_name(logs)}"])  # fmt: skip


@contextlib.contextmanager
def cluster(recipe: Recipe, work: Path) -> Iterator[None]:
    """Ray for the time of a run, where it is the executor."""
    if recipe.run.executor != "ray":
        yield
        return
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray

    need, workers, address = int(recipe.ray.memory_gib * 2**30), recipe.run.workers, recipe.ray.address
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    # Short, for the paths of its sockets may have 107 characters; the same again, so that what a killed run left goes.
    owner = hashlib.sha256(f"{work} {os.getuid()}".encode()).hexdigest()
    folder = Path("/tmp") / f"ray-xlscale-{owner[:12]}"
    shutil.rmtree(folder, ignore_errors=True)
    bind_forks()
    try:
        with silenced(work / "ray.log"):
            if address:
                modules = {"env_vars": {"PYTHONPATH": str(SOURCE)}}
                try:
                    ray.init(address, runtime_env=modules, **quiet)
                except ConnectionError as error:
                    raise RecipeError([f"ray.address = {address!r}: {error}; start it, or leave it empty"]) from error
            else:
                ray.init(
                    "local",
                    num_cpus=workers,
                    object_store_memory=80 * 2**20,
                    _memory=workers * need,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(folder),
                    include_dashboard=False,
                    **quiet,
                )
        rooms = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(room.get("CPU", 0) >= 1 and room.get("memory", 0) >= need for room in rooms):
            raise RecipeError([f"ray.memory_gib = {recipe.ray.memory_gib:g}: no machine of Ray's has so much and a "
                               f"core; lower it"])  # fmt: skip
        yield
    finally:
        with silenced(work / "ray.log"):
            ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


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
