"""Checkpoints that are damaged, missing or without room: said by name, and the run goes on from what is whole."""

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.distributed.conftest import WORKER, ConfigFor, shape_changes
from tests.distributed.launch import run, start, stop
from tests.distributed.test_faults import refused
from xlscale.checkpoint.newest import newest
from xlscale.checkpoint.retention import LATEST, folder_name, folders
from xlscale.checkpoint.store import FORMAT, MANIFEST, Checkpoint, OtherFormatError, _seal
from xlscale.config import ConfigError, load_config
from xlscale.parallel.sharded import KINDS
from xlscale.training.loop import train
from xlscale.training.metrics import read_events, read_metrics

STEPS, EVERY = 40, 2
CHANGES = shape_changes("dp2-tp1") | {
    "training.total_steps": STEPS,
    "model.hidden_dropout_prob": 0.1,
    "checkpoint.every": EVERY,
}
VOLATILE = {"time", "tokens_per_second", "step_seconds", "data_seconds", "memory_gib", "save_seconds"}
SECOND_RANK = "partitions-tp00-dp0001.safetensors"


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """A run's metrics, to the bit, without what a clock says."""
    return [{key: value for key, value in r.items() if key not in VOLATILE} for r in read_metrics(run_dir)]


def contents(folder: Path) -> dict[str, Any]:
    """What a checkpoint holds, its digests checked: every tensor's bytes, and the states; not the run's name."""
    checkpoint = Checkpoint.open(folder)
    files = checkpoint.manifest["files"]
    assert not checkpoint.damaged(files)
    found = {name: entry["parts"] for name, entry in files.items() if name.endswith(".json")}
    for path in folder.glob("partitions-*"):  # the header's metadata come in any order
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[f"{path.name} {name}"] = hashlib.sha256(file.get_tensor(name).numpy().tobytes()).hexdigest()
    assert any("exp_avg_sq/" in name for name in found)
    return found


@pytest.fixture(scope="module")
def whole(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an uninterrupted run of two ranks, all its checkpoints kept."""
    root = tmp_path_factory.mktemp("keeping")
    run(2, [WORKER, str(tiny_config(root, "whole", CHANGES))], root / "whole.log", timeout=120)
    return root / "whole"


@pytest.fixture
def two(whole: Path, tmp_path: Path) -> Path:
    """A copy of two of its checkpoints."""
    root = tmp_path / "run" / "checkpoints"
    for step in (2, 4):
        shutil.copytree(whole / "checkpoints" / folder_name(step), root / folder_name(step))
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines[:5]))
    return root


def header_bytes(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def middle_of(kind: str) -> Callable[[Path], int]:
    """Offset in the middle of a partition file's largest tensor of one kind."""

    def offset(path: Path) -> int:
        header = json.loads(path.read_bytes()[8 : header_bytes(path)])
        spans = [entry["data_offsets"] for name, entry in header.items() if name.startswith(f"{kind}/")]
        first, last = max(spans, key=lambda span: span[1] - span[0])
        return header_bytes(path) + (first + last) // 2

    return offset


def middle(path: Path) -> int:
    return path.stat().st_size // 2


# What a checkpoint is made of -> the file and the byte that is damaged.
REGIONS: dict[str, tuple[str, Callable[[Path], int]]] = {
    "manifest": (MANIFEST, middle),
    "manifest's seal": (MANIFEST, lambda path: path.read_bytes().index(b'"seal"') + 12),
    "header length": (SECOND_RANK, lambda path: 0),
    "header": (SECOND_RANK, lambda path: header_bytes(path) // 2),
    **{kind: (SECOND_RANK, middle_of(kind)) for kind in KINDS},
    "last byte": ("partitions-tp00-dp0000.safetensors", lambda path: path.stat().st_size - 1),
    "stream": ("stream.json", middle),
    "faults": ("faults.json", middle),
    "data faults": ("data_faults.json", middle),
    "means": ("means.json", middle),
    "tokens seen": ("tokens_seen.json", middle),
    "probe": ("probe.safetensors", middle),
    "config": ("config.toml", middle),
    "tokenizer": ("tokenizer/tokenizer.json", middle),
    "tokenizer's model": ("tokenizer/sentencepiece.bpe.model", middle),
}


def damage(path: Path, offset: int, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
        return
    if how == "flipped":
        content[offset] ^= 1
    path.write_bytes(content[:offset] if how == "cut" else content)


def test_every_file_of_a_checkpoint_is_damaged_below(two: Path) -> None:
    files = {str(path.relative_to(two / folder_name(4))) for path in (two / folder_name(4)).rglob("*.*")}
    others = {file for file in files - {name for name, _ in REGIONS.values()} if not file.startswith("tokenizer/")}
    assert not others


@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
@pytest.mark.parametrize("region", REGIONS)
def test_damaged_bytes_of_any_class_are_refused_by_name_and_the_one_before_is_taken(
    region: str, how: str, two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name, offset = REGIONS[region]
    path = two / folder_name(4) / name
    damage(path, offset(path), how)
    with caplog.at_level("WARNING", logger="xlscale"):
        found = newest(two)
    assert found is not None and found.step == 2
    assert "checkpoint passed over: " in caplog.text and folder_name(4) in caplog.text and name in caplog.text


def test_no_flipped_bit_of_the_manifest_is_believed(two: Path) -> None:
    """Every 7th byte, each bit in turn: refused with a ValueError, or no different in meaning (a blank for another)."""
    path = two / folder_name(4) / MANIFEST
    content, manifest = path.read_bytes(), json.loads(path.read_text())
    for number, offset in enumerate(range(0, len(content), 7)):
        path.write_bytes(content[:offset] + bytes([content[offset] ^ 1 << number % 8]) + content[offset + 1 :])
        try:
            assert Checkpoint.open(path.parent).manifest == manifest
        except ValueError as error:
            assert str(path.parent) in str(error)


def test_checkpoint_of_a_later_format_is_refused_and_no_older_one_taken(two: Path) -> None:
    path = two / folder_name(4) / MANIFEST
    manifest = json.loads(path.read_text()) | {"format": 99}
    path.write_text(json.dumps(manifest | {"seal": _seal(manifest)}))
    with pytest.raises(
        OtherFormatError, match=f"{folder_name(4)} has format 99, .* reads {FORMAT}; use the one that wrote it"
    ):
        newest(two)


def test_broken_checkpoints_are_set_aside_and_the_run_ends_as_if_they_had_been_whole(
    two: Path, whole: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    run_dir = two.parent
    shutil.copytree(two / folder_name(4), two / folder_name(6))
    damage(two / folder_name(4) / SECOND_RANK, 5000, "flipped")
    damage(two / folder_name(6) / MANIFEST, 100, "cut")
    (two / LATEST).write_text("no link any more")
    config = tiny_config(tmp_path, "run", CHANGES | {"training.stop_after": 8, "checkpoint.keep": 0})

    run(2, [WORKER, str(config)], tmp_path / "log", timeout=120)

    assert [path.name for path in folders(two)] == [folder_name(step) for step in (8, 6, 4, 2)]
    assert {path.name for path in two.glob("*.broken*")} == {f"{folder_name(step)}.broken" for step in (4, 6)}
    with pytest.raises(ValueError, match=r"not a whole checkpoint: manifest\.json"):
        Checkpoint.open(two / f"{folder_name(6)}.broken")
    assert (two / LATEST).resolve() == two / folder_name(8)
    said = (run_dir / "log.txt").read_text()
    assert f"{two / folder_name(4) / SECOND_RANK} is damaged" in said
    assert f"{two / folder_name(6)} is set aside as {folder_name(6)}.broken" in said
    assert [event["step"] for event in read_events(run_dir) if event["event"] == "resume"] == [2]
    assert curve(run_dir) == curve(whole)[:8]
    for step in (4, 6, 8):
        assert contents(two / folder_name(step)) == contents(whole / "checkpoints" / folder_name(step))


def test_a_run_with_nothing_but_broken_checkpoints_is_not_begun_anew(
    two: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    for path in folders(two):
        (path / SECOND_RANK).unlink()
    config = tiny_config(tmp_path, "run", CHANGES | {"training.micro_batch_size": 4})
    with pytest.raises(ConfigError, match=f"no whole checkpoint, all are broken: {folder_name(4)}, {folder_name(2)}; "):
        train(load_config(config))
    assert [path.name for path in folders(two)] == [folder_name(4), folder_name(2)]
    assert len(read_metrics(two.parent)) == 5


def mounted(disk: Path, options: str) -> bool:
    disk.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def unmount(disk: Path) -> None:
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MiB."""
    disk = tmp_path / "disk"
    if not mounted(disk, "size=24m"):
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    unmount(disk)


def fill(disk: Path, leave: int) -> Path:
    """A file that takes all room but `leave` bytes, to the page."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096:
                pass
        except OSError:
            file.truncate(max(0, filler.stat().st_size - leave) // 4096 * 4096)
    return filler


@pytest.mark.parametrize("room", ["nothing", "half a partition", "the partitions alone"])
def test_a_full_disk_fails_the_saves_and_ends_the_run_only_at_its_end(
    room: str, whole: Path, small_disk: Path, tiny_config: ConfigFor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = {"training.micro_batch_size": 4, "run.dir": str(small_disk), "data.cache": str(whole.parent / "tokens")}
    config = tiny_config(tmp_path, "run", CHANGES | alone)
    train(load_config(config, ["training.stop_after=4"]))
    root = small_disk / "run" / "checkpoints"
    before, partition = contents(root / folder_name(4)), (root / folder_name(4)).glob("partitions-*")
    size = sum(path.stat().st_size for path in partition)
    filler = fill(small_disk, {"nothing": 0, "half a partition": size // 2}.get(room, size + 100_000))

    line = (
        rf"^stopped after update 9: the disk is full: checkpoint {folder_name(9)} is not saved, {folder_name(4)} stays"
    )
    with pytest.raises(ConfigError, match=line):
        train(load_config(config, ["training.stop_after=9"]))

    assert [path.name for path in root.iterdir() if path.name != LATEST] == [folder_name(4), folder_name(2)]
    assert contents(root / folder_name(4)) == before
    filler.unlink()
    if room != "nothing":  # there, not even the lines that say so had room
        failed = [event for event in read_events(small_disk / "run") if event["event"] == "checkpoint_failed"]
        assert [event["step"] for event in failed] == [6, 8, 9]
        assert {event["newest"] for event in failed} == {folder_name(4)}
        assert [record["step"] for record in read_metrics(small_disk / "run")] == list(range(1, 10))
        assert "it is tried again at the next one that is due" in (small_disk / "run" / "log.txt").read_text()
    train(load_config(config, ["training.stop_after=6"]))
    assert newest(root).step == 6
    assert [record["step"] for record in read_metrics(small_disk / "run")] == list(range(1, 7))


def test_a_disk_full_for_a_while_changes_nothing_of_a_run_but_the_missing_checkpoints(
    whole: Path, small_disk: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in (whole / "checkpoints" / folder_name(2)).glob("partitions-*")]
    cache = {"run.dir": str(small_disk), "data.cache": str(whole.parent / "tokens"), "checkpoint.keep": 1}
    config = tiny_config(tmp_path, "run", CHANGES | cache)
    run_dir = small_disk / "run"
    filler = fill(small_disk, sum(sizes) * 3 // 4)  # one rank's partitions have room, and not the other's
    processes = start(2, [WORKER, str(config)], tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while "checkpoint_failed" not in [event["event"] for event in read_events(run_dir)]:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.01)
        filler.unlink()
        assert [process.wait(120) for process in processes] == [0, 0], (tmp_path / "log.0").read_text()[-3000:]
    finally:
        stop(processes)
    assert curve(run_dir) == curve(whole)
    events = [(event["step"], event["event"]) for event in read_events(run_dir) if event["event"].startswith("check")]
    assert events[0] == (EVERY, "checkpoint_failed") and events[-1] == (STEPS, "checkpoint")
    assert [step for step, _ in events] == list(range(EVERY, STEPS + 1, EVERY))
    final = contents(run_dir / "checkpoints" / folder_name(STEPS))
    assert final == contents(whole / "checkpoints" / folder_name(STEPS))


@pytest.mark.parametrize(("folder", "line"), [("run", "run folder"), ("run/checkpoints", "checkpoints")])
def test_a_read_only_folder_is_refused_before_the_first_update(
    folder: str, line: str, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    path = tmp_path / folder
    if not mounted(path, "ro"):
        pytest.skip("no tmpfs can be mounted here")
    config = tiny_config(tmp_path, "run", CHANGES | {"training.micro_batch_size": 4})
    try:
        with pytest.raises(ConfigError, match=rf"^{line} (cannot be written into )?{path}.*[Rr]ead-only"):
            train(load_config(config))
    finally:
        unmount(path)
    assert read_metrics(tmp_path / "run") == []


def test_of_two_runs_on_one_folder_the_second_is_refused_and_the_first_does_not_notice(
    whole: Path, tiny_config: ConfigFor, tmp_path: Path
) -> None:
    cache = {"data.cache": str(whole.parent / "tokens"), "training.total_steps": 4000, "checkpoint.keep": 2}
    config = tiny_config(tmp_path, "run", CHANGES | cache)
    processes = start(2, [WORKER, str(config)], tmp_path / "log")
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(tmp_path / "run")) < 3:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
        (line,) = refused(config, "training.micro_batch_size=4").splitlines()
        assert f"run folder {tmp_path / 'run'} is in use by another run" in line
        before = len(read_metrics(tmp_path / "run"))
        while len(read_metrics(tmp_path / "run")) < before + 3:
            assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
            time.sleep(0.02)
    finally:
        stop(processes)
    steps = [record["step"] for record in read_metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))
