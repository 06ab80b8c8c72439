"""A running job's Hub folders: written by all ranks, held against the weights in memory, and pushed behind it."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForMaskedLM

from tests.distributed.conftest import ConfigFor, shape_changes
from tests.distributed.export_cases import FAULTS, WRONG
from tests.distributed.launch import ROOT, environment, run
from tests.distributed.test_keeping import mounted, unmount
from tests.distributed.test_signals import ENDLESS, await_updates
from tests.fake_hub import FakeHub
from xlscale.checkpoint.card import is_marked
from xlscale.checkpoint.consolidate import export_checkpoint
from xlscale.checkpoint.push import TOKEN
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import ConfigError, load_config
from xlscale.training.loop import train
from xlscale.training.metrics import read_events, read_metrics
from xlscale.training.signals import REQUEUE

WORKER = str(ROOT / "tests" / "distributed" / "export_cases.py")
CHANGES = {
    "training.total_steps": 4,
    "schedule.warmup_steps": 2,
    "checkpoint.every": 2,
    "export.every": 2,
    "export.shard_gb": 1e-5,  # 10 kB: many files, so that both ranks write
}
SECRET = "hf_0123456789abcdefghijklmnop"


@pytest.fixture(scope="module")
def runs(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a fault and of those with one: tp 2, of a vocabulary that 2 does not divide."""
    root = tmp_path_factory.mktemp("exports")
    changes = shape_changes("dp1-tp2") | CHANGES | {"model.vocab_size": 641}
    paths = [tiny_config(root, "whole", changes | {"export.dtype": "bf16"})]
    paths += [tiny_config(root, name, changes | {"parallel.zero_stage": 1}) for name in FAULTS]
    run(2, [WORKER, *map(str, paths)], root / "log", timeout=180)
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def test_all_ranks_write_and_the_folder_is_that_of_an_export_by_hand(runs: Path, tmp_path: Path) -> None:
    folders = [runs / "whole" / "hub" / f"step-{step:08d}" for step in (2, 4)]
    events = [event for event in read_events(runs / "whole") if event["event"] == "export"]
    assert [Path(event["folder"]) for event in events] == folders
    by_hand = tensors(export_checkpoint(runs / "whole", tmp_path / "hub", "bf16"))
    for event in events:
        assert event["files"] == len(list(Path(event["folder"]).glob("*.safetensors"))) > 4
        assert event["verified_tensors"] == len(by_hand)
        assert event["bytes"] == sum(2 * tensor.numel() for tensor in by_hand.values())
    in_run = tensors(folders[1])
    assert in_run.keys() == by_hand.keys()
    assert all(torch.equal(in_run[name], by_hand[name]) for name in by_hand)
    assert not any(AutoModelForMaskedLM.from_pretrained(folders[1], output_loading_info=True)[1].values())


def test_card_of_a_run_has_its_losses(runs: Path) -> None:
    first, last = ((runs / "whole" / "hub" / f"step-{step:08d}" / "README.md") for step in (2, 4))
    assert is_marked(first) and is_marked(last)
    assert "2 of 4 updates, weights in bf16" in first.read_text()
    assert "over updates 1 to 2:" in first.read_text() and "over updates 1 to 4:" in last.read_text()
    assert "Not recorded" not in last.read_text()


@pytest.mark.parametrize("fault", FAULTS)
def test_folder_that_is_not_the_weights_in_memory_is_refused_by_tensor_on_all_ranks(fault: str, runs: Path) -> None:
    for rank in (0, 1):
        refused = (runs / fault / f"refused-{rank}.txt").read_text()
        assert f"step-00000002: {WRONG} of " in refused and "are not the weights in memory" in refused
    assert not list((runs / fault / "hub").iterdir()), "nothing is left of it"
    assert Checkpoint.open(runs / fault / "checkpoints" / "step-00000002").step == 2
    assert not [event for event in read_events(runs / fault) if event["event"] == "export"]


def test_disk_that_is_full_fails_the_exports_and_ends_the_run_only_at_its_end(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    """The Hub folders have a file system of their own, too small for one."""
    config = tiny_config(tmp_path, "run", shape_changes("dp1-tp1") | CHANGES)
    run_dir, hub = tmp_path / "run", tmp_path / "run" / "hub"
    if not mounted(hub, "size=64k"):
        pytest.skip("no tmpfs can be mounted here")
    try:
        with pytest.raises(ConfigError, match=rf"^stopped after update 4: export {hub}/step-00000004: .*No space left"):
            train(load_config(config))
        assert not list(hub.iterdir()), "nothing is left of them"
    finally:
        unmount(hub)
    failed = [event["step"] for event in read_events(run_dir) if event["event"] == "export_failed"]
    assert failed == [2, 4] and len(read_metrics(run_dir)) == 4
    assert "step-00000002: " in (run_dir / "log.txt").read_text()

    train(load_config(config))
    assert [path.name for path in hub.iterdir()] == ["step-00000004"]


def test_export_due_at_the_update_that_a_signal_ends_is_made_up_for_at_the_next_start(
    tiny_config: ConfigFor, tmp_path: Path
) -> None:
    changes = shape_changes("dp1-tp1") | ENDLESS | {"export.every": 1}
    config, run_dir = tiny_config(tmp_path, "asked", changes), tmp_path / "asked"
    over = threading.Event()

    def ask() -> None:
        await_updates(run_dir, 3, lambda: not over.is_set(), config)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        with pytest.raises(SystemExit) as ended:
            train(load_config(config))
    finally:
        over.set()
        asker.join()
    assert ended.value.code == REQUEUE
    done = len(read_metrics(run_dir))
    last = run_dir / "hub" / f"step-{done:08d}"
    assert not last.exists() and last.with_name(f"step-{done - 1:08d}").exists()
    half = last.with_name(f".{last.name}.writing")  # as if a kill had come while it was made
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")

    train(load_config(config, [f"training.stop_after={done + 1}"]))
    exported = [event["step"] for event in read_events(run_dir) if event["event"] == "export"]
    assert exported == list(range(1, done + 2)) and not half.exists()
    assert tensors(last).keys() == tensors(last.with_name(f"step-{done + 1:08d}")).keys()


def test_push_that_fails_stops_no_run_and_the_token_is_nowhere(tiny_config: ConfigFor, tmp_path: Path) -> None:
    hub = FakeHub(refusals=1)
    config = tiny_config(tmp_path, "pushed", shape_changes("dp1-tp1") | CHANGES | {"export.push_to": "org/name"})
    env = environment(**{TOKEN: SECRET, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"})
    command = [sys.executable, "-m", "xlscale.cli", "train", str(config)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    run_dir = tmp_path / "pushed"
    refused, sent = (event for event in read_events(run_dir) if event["event"] == "push")
    assert (refused["ok"], refused["of_step"], sent["ok"], sent["of_step"]) == (False, 2, True, 4)
    assert "push of update 2 failed" in (run_dir / "log.txt").read_text()
    last = run_dir / "hub" / "step-00000004"
    assert hub.files == {path.name: path.read_bytes() for path in last.iterdir()}
    assert hub.tokens == {f"Bearer {SECRET}"}
    for path in [p for p in run_dir.rglob("*") if p.is_file()]:
        assert SECRET.encode() not in path.read_bytes(), path
    assert SECRET not in done.stdout + done.stderr
