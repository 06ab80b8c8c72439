"""The main job at a small size, `make demo`: archive -> shards -> tokenizer -> training -> Hub folder -> filled masks.

Interrupted, it goes on where it was; begun again after it has finished, it keeps the data and trains anew.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPE, CONFIG = "configs/data_demo.toml", "configs/demo.toml"
RUN, GRID_RUN = Path("runs/demo"), Path("runs/demo-dp2-tp2")
GRID_STEPS = 3
STEPS = 6
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
BIN = Path(sys.executable).parent


@contextmanager
def step(number: int, what: str) -> Iterator[None]:
    """A heading, and how long it took."""
    print(f"\n== {number}/{STEPS} {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"== {number}/{STEPS} done in {time.monotonic() - started:.0f} s", flush=True)


def command(*arguments: str | Path) -> None:
    """Show a command, run it in the repository's root, and end the demo if it fails."""
    words = [str(argument) for argument in arguments]
    print("$ " + " ".join(words).replace(f"{BIN}{os.sep}", ""), flush=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    code = subprocess.run(words, cwd=ROOT, env=environment, preexec_fn=die_with_the_demo).returncode
    if code:
        print(
            f"demo: the command above ended with {code}; mend what it says and run `make demo` again",
            flush=True,
        )
        sys.exit(code)


def die_with_the_demo() -> None:
    """Linux sends a command SIGTERM when the demo is killed, so that none trains on beside the next demo."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def losses(run_dir: Path) -> list[float]:
    """Loss of every update of a run."""
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def faster_precision() -> str:
    """bf16 or fp32: whichever multiplies matrices faster on this machine; a run that goes on keeps what it has."""
    if (RUN / "config.toml").exists():
        return str(tomllib.loads((RUN / "config.toml").read_text(encoding="utf-8"))["training"]["precision"])
    import torch

    def seconds(dtype: torch.dtype) -> float:
        a = torch.randn(512, 512).to(dtype)
        timings = []
        for _ in range(20):
            started = time.perf_counter()
            a @ a
            timings.append(time.perf_counter() - started)
        return min(timings)  # what else runs on the machine only ever adds

    return "bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"


def start_over_if_finished() -> None:
    """A finished run would have nothing left to show; it is set aside. An unfinished one goes on."""
    if (RUN / "report.html").exists():
        aside = RUN.with_name(f"{RUN.name}-previous")
        shutil.rmtree(aside, ignore_errors=True)
        RUN.rename(aside)
        print(f"the finished run was moved to {aside}")
    shutil.rmtree(GRID_RUN, ignore_errors=True)


def main() -> None:
    """All six steps."""
    os.chdir(ROOT)
    started = time.monotonic()
    with step(1, "web archive -> cleaned, language-identified, deduplicated shards"):
        print("   the archive: data_pipelines/sample (what it is and its licences: SOURCES.md there)")
        command(BIN / "python", "-m", "data_pipelines", RECIPE)
    with step(2, "shards -> SentencePiece tokenizer, languages balanced with alpha = 0.3"):
        command(BIN / "python", "-m", "data_pipelines", "tokenizer", RECIPE)
    start_over_if_finished()
    precision = faster_precision()
    with step(3, f"pretraining on 2 processes, ZeRO-3, {precision} (the faster one here)"):
        command("launch/local.sh", "2", CONFIG, "--set", f"training.precision={precision}")
    with step(4, f"the same start on dp2 x tp2 (4 processes): {GRID_STEPS} updates, equal losses"):
        changes = [
            f"run.name={GRID_RUN.name}",
            f"training.precision={precision}",
            f"training.stop_after={GRID_STEPS}",
            "parallel.tensor_parallel=2",
            "training.threads=1",
        ]
        command("launch/local.sh", "4", CONFIG, *(word for change in changes for word in ("--set", change)))
        compare_first_losses(1e-4 if precision == "fp32" else 1e-2)
    with step(5, "checkpoint -> Hub folder (safetensors, config.json, tokenizer)"):
        command(BIN / "xlscale", "export", RUN, "--out", RUN / "hub" / "demo")
        command(BIN / "xlscale", "export", GRID_RUN, "--out", GRID_RUN / "hub" / "from-dp2-tp2")
    with step(6, "transformers loads it and fills masks; the report"):
        command(BIN / "python", "launch/fill_masks.py", RUN / "hub" / "demo", RUN)
        command(BIN / "xlscale", "report", RUN)
    print(f"\ndemo: {time.monotonic() - started:.0f} s in all")
    print(f"demo: open {RUN / 'report.html'}; the model is {RUN / 'hub' / 'demo'}")


def compare_first_losses(tolerance: float) -> None:
    """The two runs started from the same seed: their first losses must be the same, whatever the shape."""
    print("   update   dp2 x tp1   dp2 x tp2   difference")
    for number, (a, b) in enumerate(zip(losses(RUN), losses(GRID_RUN), strict=False), 1):
        difference = abs(a - b) / a
        print(f"   {number:6d}   {a:9.6f}   {b:9.6f}   {difference:.1e}")
        if difference > tolerance:
            sys.exit(f"demo: update {number} differs by {difference:.1e}, more than {tolerance:.0e}: report this bug")


if __name__ == "__main__":
    main()
