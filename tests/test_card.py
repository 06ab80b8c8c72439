"""The model card: what it tells of a run, what it keeps to itself, and whose README.md it replaces."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from xlscale.checkpoint import card
from xlscale.checkpoint.card import is_marked, last_records, marked, model_card, public_toml
from xlscale.config import load_config
from xlscale.config_sections import Config

CONFIG = load_config(Path(__file__).parents[1] / "configs" / "demo.toml")
MANIFEST: dict[str, Any] = {
    "step": 3,
    "slot": 96,
    "topology": {"dp": 2, "tp": 4, "zero_stage": 3},
    "versions": {"torch": "2.13.0"},
    "parameters": {"a": {"shape": [10, 20]}, "b": {"shape": [5]}},
}
STREAM = {"languages": ["de_DE", "no_XX", "zh_CN", "zh_TW"], "corpus": "c0ffee", "tokenizer": "abcdef"}


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "loss": 2.0 + step,
            "loss_per_language": {"de_DE": float(step), **({"no_XX": 7.0} if step == 2 else {}), "zh_CN": None},
            "tokens_per_language": {"de_DE": 60, "zh_TW": 40},
        }
        for step in range(1, count + 1)
    ]


def told(config: Config = CONFIG, of: list[dict[str, Any]] | None = None) -> str:
    return model_card(MANIFEST, STREAM, config, records(3) if of is None else of, "bf16")


def test_card_tells_languages_data_steps_config_and_losses_per_language() -> None:
    text = told()
    for fact in (
        "205 parameters, 4 languages, 3 of",
        "| corpus | `c0ffee` |",
        "dp 2 x tp 4, ZeRO stage 3",
        "updates 1 to 3: 4.0000",
        "| de_DE | 2.0000 | 60.00% |",
        "| no_XX | 7.0000 | 0.00% |",
        "| zh_CN | - | 0.00% |",
        "| zh_TW | - | 40.00% |",
        f"learning_rate = {CONFIG.optimizer.learning_rate}",
    ):
        assert fact in text, fact


def test_header_is_what_the_hub_reads_and_norwegian_is_not_false() -> None:
    _, header, _ = told().split("---\n", 2)
    found = yaml.safe_load(header)
    assert found["language"] == ["de", "no", "zh"]
    assert (found["pipeline_tag"], found["library_name"]) == ("fill-mask", "transformers")


def test_card_of_a_checkpoint_away_from_its_run_says_so() -> None:
    assert "Not recorded: the checkpoint was exported without the metrics" in told(of=[])


def test_card_keeps_paths_and_credentials_to_itself() -> None:
    data = replace(
        CONFIG.data,
        shards="https://me:secret@host.org/shards/v1?sig=signature",
        tokenizer="/home/somebody/tokenizers/spm250k",
        cache="/scratch/somebody/cache",
    )
    config = replace(CONFIG, data=data, deepspeed={"aio": {"path": "/local/somebody/nvme"}})
    text = told(config)
    for private in ("secret", "signature", "somebody"):
        assert private not in text
    assert 'shards = "https://host.org/shards/v1"' in public_toml(config)
    assert 'tokenizer = "spm250k"' in text and '"nvme"' in text


def test_card_is_known_until_it_is_edited(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    assert not is_marked(path)
    path.write_text(marked(told()))
    assert is_marked(path)
    path.write_text(path.read_text().replace("languages", "tongues"))
    assert not is_marked(path)


@pytest.mark.parametrize("block", [7, 64, 1 << 20])
def test_last_records_are_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(card, "BLOCK", block)
    path = tmp_path / "metrics.jsonl"
    assert last_records(path, 9) == []
    path.write_text("".join(json.dumps(record) + "\n" for record in records(9)) + '{"step": 10, "lo')
    assert [record["step"] for record in last_records(path, 7, 3)] == [5, 6, 7]
    assert last_records(path, 9) == records(9)
