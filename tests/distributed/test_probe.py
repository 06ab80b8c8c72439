"""The logits stored beside a checkpoint: plain torch's, found again by a sound load, and missed by any other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.distributed.conftest import ConfigFor, shape_changes
from xlscale.checkpoint.partition_file import file_entry, partition_file
from xlscale.checkpoint.store import MANIFEST, Checkpoint, _seal
from xlscale.config import load_config
from xlscale.models.heads import MaskedLM
from xlscale.training.loop import train
from xlscale.training.metrics import read_metrics
from xlscale.training.probe import farthest, probe_inputs

STEPS = 3
LAYERS = [f"encoder.layers.{layer}.attention.query.weight" for layer in (0, 1)]


def config_for(tiny_config: ConfigFor, folder: Path, name: str) -> Path:
    dropout = {"model.hidden_dropout_prob": 0.1, "model.attention_probs_dropout_prob": 0.1}
    return tiny_config(folder, name, shape_changes("dp1-tp1") | dropout | {"training.stop_after": STEPS})


@pytest.fixture(scope="module")
def origin(tiny_config: ConfigFor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of three updates, with dropout, which the probe must be without."""
    folder = tmp_path_factory.mktemp("probe")
    train(load_config(config_for(tiny_config, folder, "origin")))
    return folder / "origin"


@pytest.fixture
def go_on(origin: Path, tiny_config: ConfigFor, tmp_path: Path) -> tuple[Path, Path]:
    """Config of a run in another folder that is at the origin's checkpoint, and that checkpoint."""
    checkpoint = tmp_path / "moved" / "checkpoints" / f"step-{STEPS:08d}"
    shutil.copytree(origin / "checkpoints" / checkpoint.name, checkpoint)
    return config_for(tiny_config, tmp_path, "moved"), checkpoint


def swap_two_layers(checkpoint: Path) -> None:
    """Give two layers each other's queries, as a wrong slicing might, in a checkpoint without a wrong digest."""
    path = checkpoint / partition_file(0, 0)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    first, second = (f"fp32/{name}" for name in LAYERS)
    save_file(tensors | {first: tensors[second], second: tensors[first]}, path, metadata)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][path.name] = file_entry(path)
    (checkpoint / MANIFEST).write_text(json.dumps(manifest | {"seal": _seal(manifest)}))


def test_the_probes_logits_are_plain_torchs(origin: Path) -> None:
    checkpoint = Checkpoint.open(origin / "checkpoints" / f"step-{STEPS:08d}")
    config, stored = load_config(origin / "config.toml"), checkpoint.state("probe")
    model = MaskedLM(config.model).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(checkpoint.full(name))
        ids_BT = stored["input_ids"]
        wanted = model.logits(ids_BT, ids_BT != config.model.pad_token_id, stored["positions"])
    assert stored["logits"].shape == (8, config.model.vocab_size)
    assert farthest(stored["logits"], wanted)[0] <= 1e-5
    again = probe_inputs(config.model, ids_BT.shape[1])
    assert all(torch.equal(stored[key], value) for key, value in again.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_layers_that_changed_places_are_refused_where_every_digest_is_right(
    precision: str, go_on: tuple[Path, Path]
) -> None:
    config, checkpoint = go_on
    overrides = [f"training.precision={precision}", f"training.stop_after={STEPS + 1}"]
    swap_two_layers(checkpoint)
    with pytest.raises(ValueError, match=r"step-00000003: .* gives other logits .*; every byte is as it was written"):
        train(load_config(config, overrides))
    assert read_metrics(checkpoint.parents[1]) == []
    train(load_config(config, [*overrides, "checkpoint.probe=false"]))
    assert [record["step"] for record in read_metrics(checkpoint.parents[1])] == [STEPS + 1]
    later = Checkpoint.open(checkpoint.with_name(f"step-{STEPS + 1:08d}"))
    assert later.state("probe") == {}
    swap_two_layers(checkpoint)
    shutil.rmtree(later.folder)
    train(load_config(config, overrides))


def test_a_changed_activation_is_refused_by_its_name(go_on: tuple[Path, Path]) -> None:
    with pytest.raises(ValueError, match=r"the config has changed: model\.hidden_act was 'gelu' and is 'silu'; "):
        train(load_config(go_on[0], ['model.hidden_act="silu"']))


def test_rounding_is_told_from_a_wrong_model_whatever_all_logits_share() -> None:
    wanted = torch.randn(8, 5000, generator=torch.Generator().manual_seed(0)) + 30.0
    rounded = wanted.bfloat16()
    off, tolerance = farthest(rounded, wanted)
    assert off <= tolerance
    for dtype in (torch.float32, torch.bfloat16):
        off, tolerance = farthest(wanted.roll(1, 1).to(dtype), wanted.to(dtype))
        assert off > 5 * tolerance
        off, tolerance = farthest(torch.full_like(wanted, torch.nan).to(dtype), wanted)
        assert not off <= tolerance
