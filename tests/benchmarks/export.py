"""A checkpoint of dp 8 x tp 4 with XXL's names and shapes becomes a Hub folder; memory, and speed beside cp's.

    python -m tests.benchmarks.export FOLDER [LAYERS] [DTYPE]

FOLDER needs 24 bytes for each parameter (XXL with 2 of its 48 layers: 1.4B, 35 GB) and is emptied again. The checkpoint
has weights and both moments, as a real one, random. Both, `cp` and the export, get the same files, from the disk and
not from its cache, and end when all they wrote is on the disk (fsync); cp runs before and after. The export checks
the digests of the weights, which cp does not, and reads no moments. Bars: the export's peak resident memory (VmHWM,
pages of mapped files included) is at most 1 GiB + the largest tensor, and its speed over the files 0.7 of cp's.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import torch

from xlscale.checkpoint import store
from xlscale.checkpoint.consolidate import export_checkpoint
from xlscale.checkpoint.digests import digest, file_digests
from xlscale.checkpoint.hub_config import TOKENIZER_FILES, TOKENIZERS
from xlscale.checkpoint.hub_names import hf_names, shapes_of
from xlscale.checkpoint.partition_file import PartitionFile, file_entry, partition_file
from xlscale.checkpoint.tensor_file import DTYPES
from xlscale.checkpoint.weights import INDEX, SAFETENSORS
from xlscale.config import load_config, to_toml
from xlscale.config_sections import Config
from xlscale.parallel.sharded import FP32, KINDS, share
from xlscale.parallel.tensor_parallel import split_dim

DP, TP = 8, 4
XXL = Path(__file__).resolve().parents[2] / "configs" / "xlmr_xxl.toml"
SPEED = 0.7
DIGESTS = "digests.json"
RANDOM = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02


def values(key: str, size: int) -> torch.Tensor:
    """`size` numbers that are another run of the same random ones for every key."""
    start = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") % len(RANDOM)
    copies = -(-(start + size) // len(RANDOM))
    return (RANDOM.repeat(copies) if copies > 1 else RANDOM)[start : start + size].clone()


def make(folder: Path, config: Config, dp: int, tp: int, dtype: str) -> None:
    """Write the checkpoint `folder`, and beside it the digests that its exported tensors must have."""
    shapes = shapes_of(config.model, pooler=False)
    sums = dict.fromkeys(shapes, 0)
    (folder / "tokenizer").mkdir(parents=True)
    for name in TOKENIZER_FILES[TOKENIZERS[config.model.model_type]]:
        (folder / "tokenizer" / name).write_text("{}")
    (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
    files = {}
    for tp_rank in range(tp):
        for dp_rank in range(dp):
            ranges = {}
            for name, shape in shapes.items():
                dim = split_dim(name)
                low, high = share(shape[dim], tp_rank, tp) if dim is not None else (0, shape[0])
                ranges[name] = share((high - low) * (shape[0] if dim == 1 else math.prod(shape[1:])), dp_rank, dp)
            file = PartitionFile(folder / partition_file(tp_rank, dp_rank), ranges)
            for kind in KINDS:
                for name, (start, stop) in ranges.items():
                    dim, shape = split_dim(name), shapes[name]
                    held = values(f"{kind}/{name}/{dp_rank}/{tp_rank if dim is not None else 0}", stop - start)
                    file.write(held)
                    if kind == FP32 and (dim is not None or not tp_rank):
                        low, high = share(shape[dim or 0], tp_rank, tp)
                        width = math.prod(shape[1:])
                        columns = {"narrow": high - low, "width": width, "offset": low} if dim == 1 else {}
                        first = start + (low * width if dim == 0 else 0)
                        sums[name] += digest(held.to(DTYPES[dtype][0]), first, **columns)
            files[file.path.name] = file.close()
    files |= {
        str(path.relative_to(folder)): file_entry(path)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in files
    }
    manifest = {
        "format": store.FORMAT,
        "step": 1,
        "slot": config.training.global_batch_size,
        "optimizer_steps": 1,
        "language_steps": {},
        "topology": {"dp": dp, "tp": tp, "zero_stage": 3},
        "versions": store.versions(),
        "parameters": {name: {"shape": list(shape), "split_dim": split_dim(name)} for name, shape in shapes.items()},
        "files": files,
    }
    manifest["seal"] = store._seal(manifest)
    (folder / store.MANIFEST).write_text(json.dumps(manifest))
    (folder.parent / DIGESTS).write_text(json.dumps({name: total % (1 << 64) for name, total in sums.items()}))


def check(hub: Path, config: Config, digests: Path) -> int:
    """Compare every tensor of an exported folder with what was put into the checkpoint; how many there are."""
    names = hf_names(config.model, pooler=False)
    wanted = json.loads(digests.read_text())
    index = json.loads((hub / INDEX).read_text())["weight_map"] if (hub / INDEX).exists() else {}
    for ours, theirs in names.items():
        found = file_digests(hub / index.get(theirs, SAFETENSORS), {ours: theirs})
        assert found[ours] == wanted[ours], f"{ours} is not what was put in"
    return len(names)


def evict(folder: Path) -> None:
    """Have every file of a folder on the disk, and none of it in memory."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copied(folder: Path, to: Path) -> float:
    """Seconds of cp -r, all of it on the disk."""
    evict(folder)
    started = time.perf_counter()
    subprocess.run(["cp", "-r", folder, to], check=True)
    for path in to.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    shutil.rmtree(to)
    return seconds


def exported(folder: Path, out: Path, dtype: str) -> dict[str, float]:
    """Seconds and peak GiB of an export, in a process of its own."""
    evict(folder)
    command = [sys.executable, "-m", "tests.benchmarks.export", "--export", folder, out, dtype]
    told = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def export_here(folder: Path, out: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    started = time.perf_counter()
    export_checkpoint(folder, out, dtype)
    seconds = time.perf_counter() - started
    peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
    assert peak
    print(json.dumps({"seconds": seconds, "peak": int(peak[1]) / 2**20}))


def main(root: Path, layers: int, dtype: str) -> None:
    """All steps, the figures, and the bars."""
    config = load_config(XXL, [f"model.num_hidden_layers={layers}"])
    shapes = shapes_of(config.model, pooler=False)
    count, largest = sum(map(math.prod, shapes.values())), max(map(math.prod, shapes.values()))
    root.mkdir(parents=True, exist_ok=True)
    needed, free = 25 * count, shutil.disk_usage(root).free
    if free < 1.2 * needed:
        sys.exit(f"{root} has {free / 1e9:.0f} GB free; {layers} layers need {1.2 * needed / 1e9:.0f} GB")
    checkpoint, hub = root / "checkpoint", root / "hub"
    print(
        f"XXL with {layers} layers: {count:,} parameters, {len(shapes)} tensors, dp {DP} x tp {TP}, to {dtype}",
        flush=True,
    )
    try:
        make(checkpoint, config, DP, TP, dtype)
        size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
        written = count * DTYPES[dtype][0].itemsize
        first = copied(checkpoint, root / "copy")
        print(f"cp, before: {first:.1f} s", flush=True)
        found = exported(checkpoint, hub, dtype)
        print(f"export: {found['seconds']:.1f} s, {found['peak']:.2f} GiB", flush=True)
        tensors = check(hub, config, root / DIGESTS)
        shutil.rmtree(hub)
        second = copied(checkpoint, root / "copy")
    finally:
        for made in (checkpoint, hub, root / "copy"):
            shutil.rmtree(made, ignore_errors=True)
    cp, seconds, limit = fmean((first, second)), found["seconds"], 1.0 + largest * 4 / 2**30
    print(
        f"cp      {size / 1e9:6.1f} GB read and written, {first:.1f} s, then {second:.1f} s: {size / cp / 1e9:.2f} GB/s"
    )
    print(
        f"export  {size / 1e9:6.1f} GB read, {written / 1e9:.1f} written, {seconds:.1f} s: {size / seconds / 1e9:.2f}"
    )
    ratio = written * cp / size / seconds
    print(f"speed   {cp / seconds:.2f} of cp's over the same files; {ratio:.2f} by the bytes that are written a second")
    print(f"memory  {found['peak']:.2f} GiB at its peak, at most {limit:.2f} wanted; {tensors} tensors as put in")
    assert found["peak"] <= limit and cp / seconds >= SPEED


if __name__ == "__main__":
    if sys.argv[1] == "--export":
        export_here(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
    else:
        main(Path(sys.argv[1]), int((*sys.argv, "2")[2]), (*sys.argv, "2", "fp32")[3] if len(sys.argv) > 3 else "fp32")
