"""A run of an X-MOD model: the same at any shape, resumed at another, out comes a folder that transformers loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import XmodForMaskedLM

from tests.distributed.conftest import BATCH, WORKER, ConfigFor
from tests.distributed.launch import run
from xlscale.checkpoint.adapter_file import open_adapters
from xlscale.checkpoint.store import Checkpoint
from xlscale.config import load_config
from xlscale.data.shards import Corpus
from xlscale.data.stream import open_stream
from xlscale.models.adapters import language_of
from xlscale.training.metrics import read_metrics

STEPS, HALF = 8, 4
ABSENT = "yo_NG"
"""A language with an adapter and without data."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_config: ConfigFor, tiny_corpus: Corpus) -> Path:
    root = tmp_path_factory.mktemp("xmod")
    changes: dict[str, Any] = {
        "model.model_type": "xmod",
        "model.languages": [*tiny_corpus.languages, ABSENT],
        "training.total_steps": STEPS,
        "checkpoint.every": HALF,
        "data.language_run": BATCH // 2,
        "data.languages_per_micro_step": 2,
        "data.sampling_alpha": 0.7,
        "export.every": STEPS,
    }

    def config(name: str, folder: str, **more: Any) -> str:
        written = tiny_config(root, folder, changes | {key.replace("__", "."): value for key, value in more.items()})
        return str(written.rename(root / f"{name}.toml"))

    alone = config("alone", "alone", training__micro_batch_size=BATCH)
    # Two ranks: data-parallel, tensor-parallel, and one run that changes from the first to the second.
    split = {"parallel__tensor_parallel": 2, "training__micro_batch_size": BATCH}
    two = [
        config("dp2", "dp2", training__micro_batch_size=BATCH // 2),
        config("tp2", "tp2", **split),
        config("moved-before", "moved", training__micro_batch_size=BATCH // 2, training__stop_after=HALF),
        config("moved-after", "moved", **split),
    ]
    run(1, [WORKER, alone], root / "one.log", timeout=120)
    run(2, [WORKER, *two], root / "two.log", timeout=240)
    return root


@pytest.mark.parametrize("name", ["dp2", "tp2", "moved"])
def test_losses_do_not_depend_on_the_shape(name: str, runs: Path) -> None:
    one, other = read_metrics(runs / "alone"), read_metrics(runs / name)
    assert len(one) == len(other) == STEPS
    for a, b in zip(one, other, strict=True):
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"], (a["step"], a["loss"], b["loss"])
        assert a["samples_per_language"] == b["samples_per_language"]
        assert a["loss_per_language"].keys() == b["loss_per_language"].keys()


def test_absent_languages_stay_as_they_began_and_every_language_has_its_own_count(runs: Path) -> None:
    half, last = (Checkpoint.open(runs / "moved" / "checkpoints" / f"step-{step:08d}") for step in (HALF, STEPS))
    records = read_metrics(runs / "moved")
    present = [set(record["samples_per_language"]) for record in records]
    updates = {code: sum(code in codes for codes in present) for code in set.union(*present)}
    steps = last.manifest["language_steps"]
    assert steps[ABSENT] == 0 and last.manifest["optimizer_steps"] == STEPS
    for code, wanted in updates.items():
        assert steps[code] == wanted, code
    assert len(set(steps.values())) > 2, "all languages were in as many updates"
    later = set.union(*present[HALF:])
    stayed = [code for code in steps if code not in later]
    for name in last.manifest["parameters"]:
        if language := language_of(name):
            for kind in ("fp32", "exp_avg", "exp_avg_sq"):
                same = torch.equal(half.full(name, kind), last.full(name, kind))
                assert same == (language in stayed), (name, kind)
    seen = last.state("tokens_seen")
    assert sum(seen.values()) == sum(record["tokens"] for record in records)


def test_transformers_loads_what_was_exported_in_the_run(runs: Path) -> None:
    folder = runs / "tp2" / "hub" / f"step-{STEPS:08d}"
    theirs, loading = XmodForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    adapters = open_adapters(folder).languages
    assert list(adapters) == load_config(runs / "tp2" / "config.toml").model.languages
    seen = Checkpoint.open(runs / "tp2" / "checkpoints" / f"step-{STEPS:08d}").state("tokens_seen")
    assert {code: file.tokens_seen for code, file in adapters.items() if file.tokens_seen} == seen
    probe = Checkpoint.open(runs / "tp2" / "checkpoints" / f"step-{STEPS:08d}").state("probe")
    config = load_config(runs / "tp2" / "config.toml")
    ids = probe["input_ids"]
    with torch.inference_mode():
        mask = (ids != config.model.pad_token_id).long()
        logits = theirs.eval()(input_ids=ids, attention_mask=mask, lang_ids=probe["lang_ids"]).logits
    assert (logits[probe["positions"]] - probe["logits"]).abs().max() < 1e-4


def test_each_micro_step_has_at_most_the_languages_that_were_asked_for(runs: Path) -> None:
    config = load_config(runs / "dp2" / "config.toml")
    batch = open_stream(config).batch(np.arange(STEPS * BATCH))
    per_micro_step = [len(set(languages)) for languages in batch.languages.reshape(STEPS, BATCH).tolist()]
    assert max(per_micro_step) == 2 < len(set(batch.languages.tolist()))
