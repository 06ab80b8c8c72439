"""A folder of XL's size (3.48B parameters, bf16, 7 GB) is written, read back and imported; the peak memory of each.

    python -m tests.benchmarks.hub_roundtrip FOLDER [PRESET]

FOLDER needs twice the model's size on its disk and is emptied again. Every step is a process of its own, whose peak
resident memory (VmHWM: the mapped pages of the files count too) is printed, and must stay below 3 GiB.
"""

import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.hub_folder import open_hub_folder
from xlscale.checkpoint.hub_names import shapes_of
from xlscale.checkpoint.importers import import_folder
from xlscale.config_sections import ModelConfig
from xlscale.models.families import parameter_count, preset

BLOCK = 1 << 20
LIMIT = 3.0
"""GiB"""


def values(name: str, start: int, stop: int) -> torch.Tensor:
    """Random bf16 elements `start` to `stop` of a parameter; both are multiples of BLOCK or its end."""
    blocks = []
    for first in range(start, stop, BLOCK):
        key = int.from_bytes(hashlib.sha256(f"{name} {first}".encode()).digest()[:7], "little")
        generator = torch.Generator().manual_seed(key)
        # Random bits below 2 in magnitude: any mantissa and sign, no NaN; faster than normals.
        bits = torch.randint(-(1 << 15), 1 << 15, (min(BLOCK, stop - first),), dtype=torch.int16, generator=generator)
        blocks.append((bits & ~0x4000).view(torch.bfloat16))
    return torch.cat(blocks)


def whole(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    flat = tensor.view(-1)
    for first in range(0, flat.numel(), BLOCK):
        flat[first : first + BLOCK] = values(name, first, min(first + BLOCK, flat.numel()))
    return tensor


def write(folder: Path, model: ModelConfig) -> None:
    shapes = shapes_of(model)
    write_hub_folder(folder / "written", model, shapes, lambda name: whole(name, shapes[name]), dtype="bf16")


def read(folder: Path, model: ModelConfig) -> None:
    opened = open_hub_folder(folder / "written")
    assert opened.model == model and opened.shapes == shapes_of(model)
    for name in opened.shapes:
        flat = opened.read(name).reshape(-1)
        for first in range(0, flat.numel(), BLOCK):
            wanted = values(name, first, min(first + BLOCK, flat.numel()))
            assert torch.equal(flat[first : first + BLOCK], wanted), name


def imported(folder: Path, model: ModelConfig) -> None:
    import_folder(folder / "written", folder / "imported")
    for path in sorted((folder / "written").iterdir()):
        with path.open("rb") as one, (folder / "imported" / path.name).open("rb") as other:
            assert hashlib.file_digest(one, "sha256").digest() == hashlib.file_digest(other, "sha256").digest(), path


STEPS = {"write": write, "read": read, "import": imported}


def step(name: str, folder: Path, model: ModelConfig) -> None:
    """One step in this process; prints its seconds and its peak."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    STEPS[name](folder, model)
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20  # type: ignore[index]
    print(f"{name:8s} {time.perf_counter() - started:7.1f} s   peak {peak:.2f} GiB", flush=True)
    assert peak < LIMIT, f"{peak:.2f} GiB is above {LIMIT}"


def main(folder: Path, name: str) -> None:
    """All steps, one process after the other."""
    model = preset(name)
    needed = 4 * parameter_count(model)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < 1.2 * needed:
        sys.exit(f"{folder} has {free / 1e9:.0f} GB free; two copies of {name} need {1.2 * needed / 1e9:.0f} GB")
    print(f"{name}: {parameter_count(model):,} parameters, {len(shapes_of(model))} tensors, bf16", flush=True)
    try:
        for each in STEPS:
            subprocess.run(
                [sys.executable, "-m", "tests.benchmarks.hub_roundtrip", str(folder), name, each], check=True
            )
    finally:
        for made in ("written", "imported"):
            shutil.rmtree(folder / made, ignore_errors=True)


if __name__ == "__main__":
    where, which = Path(sys.argv[1]), (sys.argv[2] if len(sys.argv) > 2 else "xlm-roberta-xl")
    if len(sys.argv) > 3:
        step(sys.argv[3], where, preset(which))
    else:
        main(where, which)
