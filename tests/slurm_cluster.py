"""A Slurm of one machine, for tests: sbatch, squeue, srun and scontrol that really run a script's array elements.

Its state is the folder $FAKE_SLURM: `jobs/<id>` (name and process), `submitted` (a line per sbatch), `scripts/<id>`.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "srun", "scontrol")


def install(folder: Path) -> dict[str, str]:
    """Puts the commands into folder/bin; returns the environment that finds them first."""
    for name in ("bin", "jobs", "scripts"):
        (folder / name).mkdir(parents=True)
    for name in COMMANDS:
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def submissions(folder: Path) -> list[str]:
    """The names of the jobs that were submitted."""
    path = folder / "submitted"
    return path.read_text().split() if path.exists() else []


def sbatch(state: Path, arguments: list[str]) -> None:
    script = Path(arguments[-1]).read_text()
    job = str(1000 + len(submissions(state)))
    (state / "scripts" / job).write_text(script)
    name = directives(script)["job-name"]
    with (state / "submitted").open("a") as file:
        file.write(f"{name}\n")
    offset = next(a.partition("RUN_OFFSET=")[2] for a in arguments if a.startswith("--export="))
    after = [a.rpartition(":")[2] for a in arguments if a.startswith("--dependency=")]
    command = [sys.executable, __file__, "run", job, *after]
    with (state / f"{job}.log").open("w") as log:
        runner = subprocess.Popen(command, env={**os.environ, "RUN_OFFSET": offset}, cwd="/", stdout=log, stderr=log,
                                  stdin=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    (state / "jobs" / job).write_text(f"{name} {runner.pid}")
    print(f"Submitted batch job {job}")


def directives(script: str) -> dict[str, str]:
    """The lines that begin with #SBATCH."""
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, re.MULTILINE))


def run(state: Path, arguments: list[str]) -> None:
    """A job: as many elements of its array at once as it says."""
    job, *after = arguments
    while any((state / "jobs" / other).exists() for other in after):
        time.sleep(0.02)
    asked = directives((state / "scripts" / job).read_text())
    found = re.fullmatch(r"0-(\d+)(?:%(\d+))?", asked["array"])
    assert found
    last, at_once, running = int(found[1]), int(found[2] or 1000), []
    for element in range(last + 1):
        while len([process for process in running if process.poll() is None]) >= at_once:
            time.sleep(0.02)
        facts = {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_JOB_ID": job, "SLURM_NODELIST": "here"}
        with Path(asked["output"].replace("%A", job).replace("%a", str(element))).open("w") as log:
            running.append(subprocess.Popen(["bash", str(state / "scripts" / job)], env={**os.environ, **facts},
                                            stdout=log, stderr=log))  # fmt: skip
    for process in running:
        process.wait()
    (state / "jobs" / job).unlink()


def squeue(state: Path, arguments: list[str]) -> None:
    name = next(a.partition("=")[2] for a in arguments if a.startswith("--name="))
    for path in (state / "jobs").iterdir():
        if path.read_text().split()[0] == name:
            print(path.name)


def srun(state: Path, arguments: list[str]) -> None:
    while arguments[0].startswith("-"):
        arguments = arguments[2 if arguments[0] == "-n" else 1 :]
    os.execvp(arguments[0], arguments)


def scontrol(state: Path, arguments: list[str]) -> None:
    assert arguments[:2] == ["show", "hostnames"]
    print(arguments[2])


if __name__ == "__main__":
    {"sbatch": sbatch, "squeue": squeue, "srun": srun, "scontrol": scontrol, "run": run}[sys.argv[1]](
        Path(os.environ["FAKE_SLURM"]), sys.argv[2:]
    )
