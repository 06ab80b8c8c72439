"""The same recipe on one machine, on Ray and on Slurm; tasks that fail, are killed or are given again."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from datatrove.pipeline.base import PipelineStep

from data_pipelines import executors, slurm
from data_pipelines.__main__ import main
from data_pipelines.config_load import load_recipe
from data_pipelines.stages import Stage
from tests import slurm_cluster
from tests.test_pipeline import done as done  # the fixtures
from tests.test_pipeline import recipe, same
from tests.test_pipeline import small as small

STEPS = ("read", "extract", "clean", "identify", "filter", "quality", "exact", "near", "mask", "hold_out", "write",
         "verify")  # fmt: skip
OWN = """
import os, signal, time
from pathlib import Path
from data_pipelines.steps.document import DocumentStep

class Trip(DocumentStep):
    name = "trip"

    def process(self, document):
        here, archive = Path(__file__).parent, document.metadata["archive"]
        with (here / "seen").open("a") as file:
            file.write(archive + "\\n")
        if (here / "broken").exists() and archive == "a.warc.gz":
            raise OSError(28, "the disk is full")
        if (here / "killed").exists() and archive == "a.warc.gz":
            os.kill(os.getpid(), signal.SIGKILL)
        while (here / "slow").exists():
            time.sleep(0.05)
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A Slurm; the folder of its state."""
    for name, value in slurm_cluster.install(tmp_path / "slurm").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(slurm, "POLL", 0.1)
    monkeypatch.setattr(slurm, "SETTLE", 0.3)
    return tmp_path / "slurm"


def tripping(tmp_path: Path, small: Path) -> Path:
    """A recipe with a step that fails, kills its process or waits, as files beside it say."""
    (tmp_path / "own.py").write_text(OWN)
    path = recipe(tmp_path, f"{small}/*.warc.gz")
    steps = [*STEPS[:2], f"{tmp_path}/own.py:Trip", *STEPS[2:]]
    path.write_text(f"steps = {json.dumps(steps)}\n{path.read_text()}")
    return path


def seen(tmp_path: Path) -> set[str]:
    """The archives of the pages that the step saw, since it was last asked."""
    path = tmp_path / "seen"
    found = set(path.read_text().split())
    path.unlink()
    return found


def hurried() -> None:
    """The command, which asks Slurm often, and which Ctrl-C ends even where the shell has taken that away."""
    slurm.POLL, slurm.SETTLE = 0.1, 0.3
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())


def hurried_command(*arguments: object) -> subprocess.Popen[str]:
    """hurried() in a process of its own."""
    code = "from tests.test_pipeline_executors import hurried; hurried()"
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)  # fmt: skip


def wait_until(true: Callable[[], bool]) -> None:
    """Waits, but not for ever."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ray_gives_the_bytes_of_one_machine(small, done, tmp_path, capsys):
    pytest.importorskip("ray")
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    assert main([str(config), "--executor", "ray", "--workers", "2"]) == 0
    assert same(done[0], tmp_path / "out")
    said = capsys.readouterr()
    assert not said.err
    import ray

    assert not ray.is_initialized()


@pytest.mark.slow
def test_slurm_gives_the_bytes_of_one_machine(small, done, tmp_path, cluster):
    config = recipe(tmp_path, f"{small}/*.warc.gz", more="[slurm]\nmax_array_size = 2\ntasks_per_job = 2\n")
    assert main([str(config), "--executor", "slurm", "--workers", "2"]) == 0
    assert same(done[0], tmp_path / "out")
    assert len(slurm_cluster.submissions(cluster)) >= 2


def test_dry_run_shows_the_job_script_of_the_first_unfinished_stage_and_submits_nothing(
    small, tmp_path, cluster, capsys
):
    more = '[slurm]\npartition = "cpu"\narguments = ["account=abc"]\nenvironment = "module load python"\n'
    config = recipe(tmp_path, f"{small}/*.warc.gz", more=more)
    assert main([str(config), "--executor", "slurm", "--workers", "7", "--dry-run"]) == 0
    script = capsys.readouterr().out
    for line in ("#SBATCH --partition=cpu", "#SBATCH --array=0-1%7", "#SBATCH --account=abc", "#SBATCH --qos=normal"):
        assert f"{line}\n" in script
    assert "module load python; export PATH=" in script
    assert "mail" not in script
    assert f"launch_pickled_pipeline {tmp_path}/out/work/" in script
    assert not slurm_cluster.submissions(cluster)
    assert subprocess.run(["bash", "-n"], input=script.partition("#!/bin/bash")[2], text=True).returncode == 0
    assert main([str(config), "--dry-run"]) == 0
    assert "read: 2 of 2 tasks to run, 1 at once, on local" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_command_finds_its_slurm_jobs_again_and_submits_none_twice(small, tmp_path, cluster, capsys):
    config = tripping(tmp_path, small)
    (tmp_path / "slow").touch()
    run = hurried_command(config, "--executor", "slurm")
    wait_until((tmp_path / "seen").exists)
    run.send_signal(signal.SIGINT)
    said, _ = run.communicate(timeout=30)
    assert run.returncode == 130
    assert "the jobs stay in Slurm's queue; `scancel --name=xlscale-" in said
    assert main([str(config)]) == 2
    assert "Slurm still runs tasks of this stage; go on with --executor slurm" in capsys.readouterr().err
    again = hurried_command(config, "--executor", "slurm")
    time.sleep(3)
    (tmp_path / "slow").unlink()
    again.communicate(timeout=100)
    assert again.returncode == 0
    names = slurm_cluster.submissions(cluster)
    assert len(names) == len(set(names))


@pytest.mark.parametrize("executor", ["local", pytest.param("slurm", marks=pytest.mark.slow)])
def test_failed_task_is_told_in_one_line_and_only_what_is_left_runs_again(executor, small, tmp_path, cluster, capsys):
    config = tripping(tmp_path, small)
    (tmp_path / "broken").touch()
    assert main([str(config), "--executor", executor]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert "read: task 0 of 2 failed in trip: OSError: [Errno 28] the disk is full" in error
    log = Path(error.partition("its log is ")[2].partition(";")[0])
    assert "the disk is full" in log.read_text()
    assert seen(tmp_path) == {"a.warc.gz", "b.warc.gz"}
    (tmp_path / "broken").unlink()
    assert main([str(config), "--executor", executor]) == 0
    assert seen(tmp_path) == {"a.warc.gz"}
    assert (tmp_path / "out/report.json").exists()


@pytest.mark.parametrize("executor", ["local", pytest.param("slurm", marks=pytest.mark.slow)])
def test_task_whose_process_is_killed_is_noticed_and_told(executor, small, tmp_path, cluster):
    config = tripping(tmp_path, small)
    (tmp_path / "killed").touch()
    run = hurried_command(config, "--executor", executor, "--workers", "2")
    _, error = run.communicate(timeout=60)
    assert run.returncode == 2
    error = error.strip()
    assert "\n" not in error
    assert "read: task 0 of 2 failed without a word (killed, out of memory or time); its log is" in error


class Counts(PipelineStep):
    """Says how many tasks it has seen."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder, self.tasks = folder, 0

    def run(self, data, rank=0, world_size=1):
        self.tasks += 1
        (self.folder / str(rank)).write_text(f"{self.tasks} {Path.cwd()}")


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_task_begins_with_new_steps_in_the_folder_of_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NODELIST", "here")
    for key, value in slurm_cluster.install(tmp_path / "slurm").items():
        monkeypatch.setenv(key, value)
    config = load_recipe(recipe(tmp_path, "none.warc.gz"))
    stage = Stage("read", "two tasks", [Counts(tmp_path)], [1, 1])
    executor = executors.EXECUTORS[name](config, stage, tmp_path / "logs")
    here = Path.cwd()
    monkeypatch.chdir(tmp_path)
    executor._run_for_rank(0)
    executor._run_for_rank(1)
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == [f"1 {here}"] * 2
    assert not executor.get_incomplete_ranks()
    assert (tmp_path / "logs/logs/task_00001.log").exists()


def test_executors_that_are_not_here_are_one_line(small, tmp_path, capsys, monkeypatch):
    config = recipe(tmp_path, f"{small}/*.warc.gz")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(config), "--executor", "slurm"]) == 2
    assert "there is no sbatch and no squeue on the PATH; start the command where" in capsys.readouterr().err
    monkeypatch.setattr(executors, "find_spec", lambda name: None)
    assert main([str(config), "--executor", "ray"]) == 2
    assert "pip install 'xlscale[ray]'" in capsys.readouterr().err
    assert main([str(config), "--executor", "spark"]) == 2
    assert "run.executor = 'spark' must be one of local, slurm, ray" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_work_that_was_cut_into_other_tasks_is_not_gone_on_with(small, done, tmp_path, capsys):
    config = tripping(tmp_path, small)
    (tmp_path / "broken").touch()
    assert main([str(config)]) == 2
    (tmp_path / "broken").unlink()
    assert main([str(config), "--set", "read.archives_per_task=2"]) == 0
    assert "going on" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out/report.json").read_text())["total"] == done[1]["total"]


def test_digests_of_archives_are_made_once(small, tmp_path, monkeypatch):
    from data_pipelines import archives

    made: list[str] = []
    monkeypatch.setattr(archives, "file_sha256", lambda path: made.append(str(path)) or "d" * 64)
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    paths = [str(tmp_path / "a"), str(tmp_path / "b")]
    first = archives.described(paths, tmp_path / "digests.json")
    assert archives.described(paths, tmp_path / "digests.json") == first
    assert made == paths
    time.sleep(0.01)
    (tmp_path / "b").write_bytes(b"owt")  # as long as before
    archives.described(paths, tmp_path / "digests.json")
    assert made == [*paths, paths[1]]
