"""Starts real processes for tests: one process group per launch, a hard time limit, nothing left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from xlscale.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def environment(**extra: str) -> dict[str, str]:
    """What a test process needs: one thread each, no GPU, no network, nothing of a surrounding launcher."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    path = os.pathsep.join([str(ROOT), inherited.get("PYTHONPATH", "")])
    return inherited | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        **extra,
    }


def stop(processes: list[subprocess.Popen[str]]) -> None:
    """SIGKILL to the group of each process that was started here."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def start(world_size: int, arguments: list[str], log: Path) -> list[subprocess.Popen[str]]:
    """`python arguments...` once per rank with the environment of a launcher; output goes to `log`.<rank>."""
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        env = environment(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )
        with Path(f"{log}.{rank}").open("w") as output:
            processes.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=env,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
    return processes


def run(world_size: int, arguments: list[str], log: Path, timeout: float) -> None:
    """Start, wait, and fail with the ranks' last output when one fails or the time is up."""
    processes = start(world_size, arguments, log)
    try:
        for process in processes:
            process.wait(timeout)
    finally:
        stop(processes)
    failed = [rank for rank, process in enumerate(processes) if process.returncode]
    tails = "\n".join(f"--- rank {rank}\n{Path(f'{log}.{rank}').read_text()[-3000:]}" for rank in failed)
    assert not failed, f"ranks {failed} failed\n{tails}"
