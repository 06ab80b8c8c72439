"""Slurm: a stage as arrays of jobs that are submitted once and waited for."""

import hashlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from datatrove.executor import SlurmPipelineExecutor

from data_pipelines.config import Recipe
from data_pipelines.stages import Stage
from data_pipelines.tasks import Task

SOURCE = Path(__file__).resolve().parents[1]  # where this package is imported from
POLL = 5.0  # seconds between two questions to Slurm
SETTLE = 30.0  # seconds that a file may take to show on another machine


class Slurm(Task, SlurmPipelineExecutor):
    """Submits a stage and waits for it; a job that is there, of a command that ended before, is waited for first."""

    dry_run = False

    def run(self) -> None:
        if "SLURM_ARRAY_TASK_ID" in os.environ:  # this is the job
            super().run()
            return
        submitted = False
        while self.get_incomplete_ranks():
            if not queued(self.job_name):
                if submitted:
                    time.sleep(SETTLE)
                    return
                self.launch_job()
                submitted = True
            time.sleep(POLL)

    def get_sbatch_args(self, max_array: int = 1) -> dict[str, Any]:
        arguments: dict[str, Any] = super().get_sbatch_args(max_array)
        if not self.partition:
            del arguments["partition"]  # the cluster's own
        return arguments

    def launch_merge_stats(self) -> None:
        """No job for that: the report adds up what the tasks have counted."""

    @property
    def dependency(self) -> str:
        if self.dry_run:  # asked for between the script's writing and its submission
            raise WrittenError
        return str(super().dependency)


class WrittenError(Exception):
    """A script was written that is not to be submitted."""


def slurm_executor(recipe: Recipe, stage: Stage, logs: Path) -> Slurm:
    """The executor of a stage."""
    cfg = recipe.slurm
    path = f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    modules = f"export PYTHONPATH={shlex.quote(str(SOURCE))}${{PYTHONPATH:+:$PYTHONPATH}}"
    return Slurm(
        stage.steps,
        len(stage.sizes),
        cfg.time,
        cfg.partition,
        cfg.cpus_per_task,
        cfg.memory_gib,
        workers=recipe.run.workers,
        job_name=job_name(logs),
        qos=cfg.qos,
        env_command="; ".join(filter(None, (cfg.environment, path, modules))),
        sbatch_args={name: value for name, _, value in (argument.partition("=") for argument in cfg.arguments)},
        max_array_size=cfg.max_array_size,
        logging_dir=str(logs),
        tasks_per_job=cfg.tasks_per_job,
    )


def job_name(logs: Path) -> str:
    """Of all Slurm jobs of a stage: by it a command that is given again finds them."""
    return f"xlscale-{hashlib.sha256(str(logs).encode()).hexdigest()[:12]}-{logs.name}"


def queued(name: str) -> bool:
    """Whether Slurm has jobs of this name, waiting or at work."""
    asked = subprocess.run(["squeue", "--noheader", f"--name={name}", "--format=%i"], stdout=subprocess.PIPE)
    # A Slurm that does not answer has not lost its jobs.
    return asked.returncode != 0 or bool(asked.stdout.strip())
