"""The main job at a small size, `make demo`: archive -> shards -> tokenizer -> training -> Hub folder -> filled masks.

The training is killed by the demo itself, and goes on at another shape. Interrupted, the demo goes on where it was;
begun again after it has finished, it keeps the data and trains anew.
"""

import contextlib
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
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPE, CONFIG = "configs/data_demo.toml", "configs/demo.toml"
RUN, GRID_RUN = Path("runs/demo"), Path("runs/demo-dp2-tp2")
KILLED = RUN / "killed.json"
"""What the run had done when the demo killed it; it is killed once."""
KILL_AT, LOST = 600, 25
"""It is killed once it is so many updates past a checkpoint, the first at or after so many updates."""
GRID_STEPS = 3
STEPS = 7
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2}
"""What the losses of two shapes may differ by, relative."""
PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
BIN = Path(sys.executable).parent


@contextmanager
def step(number: int, what: str) -> Iterator[None]:
    """A heading, and how long it took."""
    print(f"\n== {number}/{STEPS} {what}", flush=True)
    started = time.monotonic()
    yield
    print(f"== {number}/{STEPS} done in {time.monotonic() - started:.0f} s", flush=True)


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    """Show a command and start it in the repository's root."""
    words = [str(argument) for argument in arguments]
    print("$ " + " ".join(words).replace(f"{BIN}{os.sep}", ""), flush=True)
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.Popen(words, cwd=ROOT, env=environment, preexec_fn=die_with_the_demo)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command, and end the demo if it fails."""
    code = process.wait()
    if code:
        sys.exit(f"demo: the command above ended with {code}; mend what it says and run `make demo` again")


def command(*arguments: str | Path) -> None:
    """Run a command to its end; interrupted from the keyboard, as the command itself is, it is waited for."""
    process = start(*arguments)
    try:
        finish(process)
    except KeyboardInterrupt:
        process.wait()  # a training writes a checkpoint
        raise


def die_with_the_demo() -> None:
    """Linux sends a command SIGTERM when the demo is killed, so that none trains on beside the next demo."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """The metrics of every update of a run; its last line may be cut short, of one that is under way or was killed."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(run_dir: Path) -> list[float]:
    """Loss of every update of a run."""
    return [record["loss"] for record in records(run_dir)]


def newest_checkpoint(run_dir: Path) -> int:
    """Updates done when the newest checkpoint of a run was written, 0 when there is none."""
    return max((int(path.name[5:]) for path in run_dir.glob("checkpoints/step-????????")), default=0)


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


def train_and_kill(*arguments: str | Path) -> None:
    """Train, and when the run is well past a checkpoint, SIGKILL to all its processes at once."""
    began, process = time.time(), start(*arguments)
    try:
        while process.poll() is None:
            checkpoint, last = newest_checkpoint(RUN), (records(RUN) or [{"step": 0, "time": 0.0}])[-1]
            # What an earlier process left past the checkpoint is not yet this one's.
            if checkpoint >= KILL_AT and last["step"] >= checkpoint + LOST and last["time"] > began:
                break
            time.sleep(0.5)
        else:  # it has failed, or this is the end of a run that was interrupted just before
            finish(process)
            print("   the run ended before it could be killed")
            return
        # What launch/local.sh has started is a process group: the launcher and the training processes.
        group = child_of(process.pid)
        os.killpg(group, signal.SIGKILL)
        process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise
    done, checkpoint = losses(RUN), newest_checkpoint(RUN)
    print(f"   the demo did that: SIGKILL to process group {group}, the launcher and both training processes,")
    print(f"   after update {len(done)}; the newest checkpoint is of update {checkpoint}: what came after it is lost")
    written = KILLED.with_suffix(".partial")
    written.write_text(json.dumps({"checkpoint": checkpoint, "losses": done}))
    written.replace(KILLED)


def child_of(parent: int) -> int:
    """Process id of the child of a process that has one."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended since
            if int(stat.read_text().rpartition(")")[2].split()[1]) == parent:
                return int(stat.parent.name)
    raise AssertionError(f"process {parent} has no child")


def start_over_if_finished() -> None:
    """A finished run would have nothing left to show; it is set aside. An unfinished one goes on."""
    if (RUN / "report.html").exists():
        aside = RUN.with_name(f"{RUN.name}-previous")
        shutil.rmtree(aside, ignore_errors=True)
        RUN.rename(aside)
        print(f"the finished run was moved to {aside}")
    shutil.rmtree(GRID_RUN, ignore_errors=True)


def main() -> None:
    """All seven steps."""
    os.chdir(ROOT)
    started = time.monotonic()
    with step(1, "web archive -> cleaned, language-identified, deduplicated shards"):
        print("   the archive: data_pipelines/sample (what it is and its licences: SOURCES.md there)")
        command(BIN / "python", "-m", "data_pipelines", RECIPE)
    with step(2, "shards -> SentencePiece tokenizer, languages balanced with alpha = 0.3"):
        command(BIN / "python", "-m", "data_pipelines", "tokenizer", RECIPE)
    start_over_if_finished()
    precision = faster_precision()
    train = ("launch/local.sh", "2", CONFIG, "--set", f"training.precision={precision}")
    with step(3, f"pretraining, dp2 (2 processes), ZeRO-3, {precision} (the faster one here), killed in the middle"):
        if KILLED.exists():
            print("   it has been killed already")
        else:
            train_and_kill(*train)
    with step(4, "the same run goes on as dp1 x tp2 (2 processes): every weight matrix is cut in two"):
        command(*train, "--set", "parallel.tensor_parallel=2")
        if KILLED.exists():
            compare_repeated(json.loads(KILLED.read_text()), TOLERANCES[precision])
    with step(5, f"the same start as dp2 x tp2 (4 processes): {GRID_STEPS} updates, equal losses"):
        changes = [
            f"run.name={GRID_RUN.name}",
            f"training.precision={precision}",
            f"training.stop_after={GRID_STEPS}",
            "parallel.tensor_parallel=2",
        ]
        command("launch/local.sh", "4", CONFIG, *(word for change in changes for word in ("--set", change)))
        compare_first_losses(TOLERANCES[precision])
    with step(
        6, "Hub folders (safetensors, config.json, tokenizer, model card): those made in the run, and one by hand"
    ):
        show_exports()
        command(BIN / "xlscale", "export", GRID_RUN, "--out", GRID_RUN / "hub" / "from-dp2-tp2")
    model = max((RUN / "hub").glob("step-*"))
    with step(7, "transformers loads the run's last one and fills masks; the report"):
        command(BIN / "python", "launch/fill_masks.py", model, RUN)
        command(BIN / "xlscale", "report", RUN)
    print(f"\ndemo: {time.monotonic() - started:.0f} s in all")
    print(f"demo: open {RUN / 'report.html'}; the model is {model}")


def compare_repeated(told: dict[str, Any], tolerance: float) -> None:
    """The updates that were lost were done again, by another shape: their losses must be the same."""
    checkpoint, killed, again = told["checkpoint"], told["losses"], losses(RUN)
    print("   update   killed run, dp2   again, tp2   difference")
    print(f"   {checkpoint:6d}   {killed[checkpoint - 1]:15.6f}   the checkpoint")
    differences = [abs(a - b) / a for a, b in zip(killed, again, strict=False)][checkpoint:]
    for number, difference in enumerate(differences, checkpoint + 1):
        if number <= checkpoint + 3 or number > len(killed) - 3:
            print(f"   {number:6d}   {killed[number - 1]:15.6f}   {again[number - 1]:10.6f}   {difference:.1e}")
        elif number == checkpoint + 4:
            print(f"      ...   {len(differences) - 6} more; the largest difference of all is {max(differences):.1e}")
    for number in range(len(killed) + 1, min(len(killed) + 3, len(again) + 1)):
        print(f"   {number:6d}                     {again[number - 1]:10.6f}   new")
    if max(differences) > tolerance:
        sys.exit(f"demo: the losses differ by {max(differences):.1e}, more than {tolerance:.0e}: report this bug")


def show_exports() -> None:
    """What the run says of its Hub folders."""
    events = map(json.loads, (RUN / "events.jsonl").read_text().splitlines())
    for event in (event for event in events if event["event"] == "export"):
        print(
            f"   {event['folder']}: {event['bytes'] / 1e6:.1f} MB {event['dtype']}, {event['verified_tensors']} "
            f"tensors compared with the weights in memory, {event['seconds']:.1f} s"
        )


def compare_first_losses(tolerance: float) -> None:
    """The two runs started from the same seed: their first losses must be the same, whatever the shape."""
    print("   update   dp2 x tp1   dp2 x tp2   difference")
    for number, (a, b) in enumerate(zip(losses(RUN), losses(GRID_RUN), strict=False), 1):
        difference = abs(a - b) / a
        print(f"   {number:6d}   {a:9.6f}   {b:9.6f}   {difference:.1e}")
        if difference > tolerance:
            sys.exit(f"demo: update {number} differs by {difference:.1e}, more than {tolerance:.0e}: report this bug")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted; `make demo` goes on where it was")
