"""Partitions of dp 8 x tp 4 become a Hub folder: every element in its place, never much of it in memory."""

from pathlib import Path

import pytest

from tests.benchmarks.export import DIGESTS, DP, TP, XXL, check, make
from xlscale.checkpoint import consolidate
from xlscale.checkpoint.adapter_file import open_adapters
from xlscale.checkpoint.consolidate import TOKENS_SEEN, Consolidation, export_checkpoint
from xlscale.checkpoint.pretrained import load_pretrained
from xlscale.checkpoint.states import encode_state
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import load_config

SMALL = [
    "model.num_hidden_layers=1",
    "model.hidden_size=64",
    "model.num_attention_heads=4",
    "model.intermediate_size=96",
    "model.vocab_size=643",  # no rank's share is a whole number of pieces, or of rows
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("piece", [1 << 21, 300])
def test_every_element_of_a_large_grid_is_in_its_place(
    dtype: str, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consolidate, "PIECE", piece)
    config = load_config(XXL, SMALL)
    make(tmp_path / "checkpoint", config, DP, TP, dtype)
    hub = export_checkpoint(tmp_path / "checkpoint", tmp_path / "hub", dtype)
    assert check(hub, config, tmp_path / DIGESTS) > 20


def test_pieces_are_small_and_files_are_mapped_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "checkpoint", load_config(XXL, SMALL), 2, 2, "fp32")
    monkeypatch.setattr(consolidate, "PIECE", 640)
    monkeypatch.setattr(consolidate, "MAPPED", 20 * 640 * 4)
    weights = Consolidation(Checkpoint.open(tmp_path / "checkpoint"))
    opened, rows = list[Checkpoint](), 0
    for piece in weights.pieces("encoder.embeddings.word.weight"):
        assert piece.numel() <= 640
        if not any(weights._checkpoint is each for each in opened):
            opened.append(weights._checkpoint)
        rows += len(piece)
    assert rows == 643 and len(opened) == 4


XMOD = [
    *SMALL[:-1],
    'model.model_type="xmod"',
    'model.languages=["en_XX", "sw_KE", "zu_ZA"]',
    "model.pre_norm=true",
    "model.vocab_size=640",
]


@pytest.mark.parametrize("start", ["", "some/folder"])
def test_an_export_with_adapter_files_says_what_each_language_has_seen(start: str, tmp_path: Path) -> None:
    """Of a run that started from a folder, nothing of the languages that it has not trained on."""
    config = load_config(XXL, [*XMOD, f'training.init_from="{start}"'])
    (tmp_path / "checkpoint").mkdir()
    name, content = encode_state(TOKENS_SEEN, {"en_XX": 7_000_000_000, "sw_KE": 5})
    (tmp_path / "checkpoint" / name).write_bytes(content)
    make(tmp_path / "checkpoint", config, 2, 2, "fp32")
    hub = export_checkpoint(tmp_path / "checkpoint", tmp_path / "hub", adapters=True)
    assert check(hub, config, tmp_path / DIGESTS) > 20
    found = {code: adapters.tokens_seen for code, adapters in open_adapters(hub).languages.items()}
    assert found == {"en_XX": 7_000_000_000, "sw_KE": 5, "zu_ZA": None if start else 0}
    served = load_pretrained(hub, languages=["en_XX"])
    served.add_adapter(hub / "adapters/zu_ZA.safetensors", "zu_ZA")
    assert served.config.languages == ["en_XX", "zu_ZA"]
