"""Out comes a Hub folder: the partitions of a real dp2 x tp2 grid, loaded by transformers with nothing missing."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer

from tests.distributed.conftest import STEPS
from xlscale.checkpoint.consolidate import export_checkpoint
from xlscale.checkpoint.hub_folder import read_hub_folder
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import load_config
from xlscale.data.stream import open_stream
from xlscale.models.heads import MaskedLM


@pytest.mark.parametrize("name", ["dp2-tp2", "post-norm"])
def test_exported_grid_gives_our_logits_in_transformers(name: str, grid: dict[str, Path]) -> None:
    config = load_config(grid[name] / "config.toml")
    folder = grid[name] / "hub" / f"step-{STEPS:08d}"
    theirs, loading = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    checkpoint = Checkpoint.open(grid[name] / "checkpoints" / f"step-{STEPS:08d}")
    ours = MaskedLM(config.model).eval()
    with torch.no_grad():
        for parameter_name, parameter in ours.named_parameters():
            parameter.copy_(checkpoint.full(parameter_name))
    batch = open_stream(config).batch(np.arange(8))
    ids = torch.from_numpy(batch.input_ids)
    mask = (ids != config.model.pad_token_id).long()
    with torch.inference_mode():
        expected = theirs.eval()(input_ids=ids, attention_mask=mask).logits
        logits = ours.logits(ids, mask)
    assert (logits - expected)[mask.bool()].abs().max() <= 1e-5
    assert AutoTokenizer.from_pretrained(folder)("a b").input_ids[0] == 0


def test_same_weights_whatever_grid_they_were_saved_by(grid: dict[str, Path], tmp_path: Path) -> None:
    """One initialisation, no update: the folders of two shapes hold the same bytes but for rounding in 10 updates."""
    folders = [
        export_checkpoint(grid[name] / "checkpoints" / "step-00000010", tmp_path / name)
        for name in ("dp1-tp1", "dp2-tp2")
    ]
    first, second = (load_file(folder / "model.safetensors") for folder in folders)
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        if not key.endswith("attention.self.key.bias"):
            assert torch.allclose(tensor, second[key], rtol=1e-3, atol=1e-5), key


def test_exported_folder_comes_back_as_the_checkpoints_weights(grid: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(grid["dp2-tp2"] / "checkpoints" / f"step-{STEPS:08d}")
    model, shapes, read = read_hub_folder(grid["dp2-tp2"] / "hub" / f"step-{STEPS:08d}")
    assert model == load_config(grid["dp2-tp2"] / "config.toml").model
    for name in shapes:
        assert torch.equal(read(name), checkpoint.full(name)), name


def test_bf16_export_is_the_rounded_fp32(grid: dict[str, Path], tmp_path: Path) -> None:
    out = export_checkpoint(grid["dp2-tp2"], tmp_path / "hub", "bf16")
    fp32 = load_file(grid["dp2-tp2"] / "hub" / f"step-{STEPS:08d}" / "model.safetensors")
    for key, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, fp32[key].bfloat16()), key
    assert not any(AutoModelForMaskedLM.from_pretrained(out, output_loading_info=True)[1].values())


def test_damaged_checkpoint_is_not_exported(grid: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no whole checkpoint"):
        export_checkpoint(tmp_path, tmp_path / "hub")
    with pytest.raises(ValueError, match="dtype='fp8'"):
        export_checkpoint(grid["dp2-tp2"], tmp_path / "hub", "fp8")
    assert not (tmp_path / "hub").exists()
