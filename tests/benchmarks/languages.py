"""X-MOD at real size (81 languages): the memory of serving some of them, what a swap takes, and extend's peak.

    python -m tests.benchmarks.languages FOLDER [PRESET] [DTYPE]

FOLDER needs twice the model's size on its disk and is emptied again. Every step is a process of its own; its seconds,
and the peak of its memory: VmHWM counts mapped pages of files too, RssAnon at the end what is the process's own.
"""

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.hub_roundtrip import whole
from xlscale import load_pretrained
from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.hub_names import shapes_of
from xlscale.extend import Changes, plan
from xlscale.models.families import parameter_count, preset

SERVED = ["en_XX", "de_DE"]


def write(folder: Path, name: str, dtype: str) -> None:
    model = preset(name)
    shapes = shapes_of(model)
    write_hub_folder(folder / "hub", model, shapes, lambda each: whole(each, shapes[each]), dtype=dtype)


def extend(folder: Path, name: str, dtype: str) -> None:
    made = plan(folder / "hub", Changes(add=["zu_ZA"], init=["average:en_XX,sw_KE"], prune=["la_VA"]))
    made.write(folder / "out")


def extract(folder: Path, name: str, dtype: str) -> None:
    plan(folder / "hub", Changes()).extract(folder / "files", ["fr_XX", "sw_KE"])


def load_all(folder: Path, name: str, dtype: str) -> torch.nn.Module:
    return load_pretrained(folder / "hub")


def load_some(folder: Path, name: str, dtype: str) -> torch.nn.Module:
    return load_pretrained(folder / "hub", languages=SERVED)


def swap(folder: Path, name: str, dtype: str) -> torch.nn.Module:
    """From files: the first digests the trunk in memory, the second finds that done."""
    served = load_pretrained(folder / "hub", languages=SERVED)
    for language in ("fr_XX", "sw_KE"):
        started = time.perf_counter()
        served.add_adapter(folder / f"files/{language}.safetensors", language)
        print(f"    add_adapter {language} {time.perf_counter() - started:.2f} s", flush=True)
    started = time.perf_counter()
    served.remove_adapter("fr_XX")
    print(f"    remove_adapter {time.perf_counter() - started:.4f} s", flush=True)
    return served


ALL = (write, extend, extract, load_all, load_some, swap)
STEPS: dict[str, Callable[[Path, str, str], object]] = {each.__name__: each for each in ALL}


def step(step_name: str, folder: Path, name: str, dtype: str) -> None:
    """One step in this process."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    kept = STEPS[step_name](folder, name, dtype)
    status = Path("/proc/self/status").read_text()
    peak, own = (int(re.search(rf"{key}:\s*(\d+)", status)[1]) / 2**20 for key in ("VmHWM", "RssAnon"))  # type: ignore[index]
    print(f"{step_name:10s} {time.perf_counter() - started:6.1f} s   peak {peak:.2f} GiB, own at the end {own:.2f}")
    del kept


def main(folder: Path, name: str, dtype: str) -> None:
    """All steps, one process after the other."""
    print(f"{name}, {dtype}: {parameter_count(preset(name)):,} parameters, 81 languages", flush=True)
    try:
        for each in STEPS:
            command = [sys.executable, "-m", "tests.benchmarks.languages", str(folder), name, dtype, each]
            subprocess.run(command, check=True)
    finally:
        for made in ("hub", "out", "files"):
            shutil.rmtree(folder / made, ignore_errors=True)


if __name__ == "__main__":
    where, *rest = sys.argv[1:]
    which, kind, *steps = [*rest, *("xmod-base", "bf16")[len(rest) :]]
    Path(where).mkdir(parents=True, exist_ok=True)
    if steps:
        step(steps[0], Path(where), which, kind)
    else:
        main(Path(where), which, kind)
