"""xlscale/parallel/universal.py, held against deepspeed's own merge of slices on real folders."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint import constants
from deepspeed.checkpoint.ds_to_universal import merge_tp_slices

from xlscale.config_sections import ModelConfig
from xlscale.models.families import preset
from xlscale.models.heads import HEADS, MaskedLM
from xlscale.parallel.tensor_parallel import VOCABULARY, plan_class, split_dim
from xlscale.parallel.universal import universal_checkpoint_info

STATES = ("fp32", "exp_avg", "exp_avg_sq")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 10,
    "adapter_reduction_factor": 2,
}
ODD = 43
"""Rows of a vocabulary that neither 2 nor 4 divides."""
FAMILIES = ("roberta-base", "xlm-roberta-xl", "xmod-large-prenorm")


def small(family: str, vocab_size: int) -> ModelConfig:
    languages = {"languages": ["en_XX", "de_DE"]} if family.startswith("xmod") else {}
    return preset(family, **SMALL, **languages, vocab_size=vocab_size)


def cut(full: torch.Tensor, name: str, tp: int) -> list[torch.Tensor]:
    """The slices of all tensor-parallel ranks, a split vocabulary filled up with zero rows to equal ones."""
    dim = split_dim(name)
    if dim is None:
        return [full] * tp
    if plan_class(name)[0] == VOCABULARY:
        rows = -(-len(full) // tp) * tp
        full = torch.cat([full, full.new_zeros(rows - len(full), *full.shape[1:])])
    return list(full.chunk(tp, dim))


def merged_by_deepspeed(
    folder: Path, info: dict[str, Any], name: str, slices: dict[str, list[torch.Tensor]], dp: int = 2
) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Each state of one parameter as ds_to_universal puts it together, and the patterns that matched nothing."""
    tp = len(slices["fp32"])
    for rank in range(tp):
        place = folder / "slices" / name / str(rank)
        place.mkdir(parents=True)
        for state in STATES:
            for number, shard in enumerate(slices[state][rank].flatten().chunk(dp)):
                torch.save(shard.clone(), place / f"{state}.{number:02d}")
        torch.save(7, place / "step.00")
    shapes = [tuple(part.shape) for part in slices["fp32"]]
    unmatched = merge_tp_slices(info, str(folder / "zero"), str(folder / "slices"), tp, (name, shapes))
    found = {s: torch.load(folder / "zero" / name / f"{s}.pt", weights_only=False) for s in STATES}
    return {state: entry[constants.PARAM] for state, entry in found.items()}, unmatched


def patterns(info: dict[str, Any]) -> set[str]:
    return {each for value in info.values() if isinstance(value, list) for each in value}


@pytest.mark.parametrize(("tp", "vocab_size"), [(2, 40), (4, ODD)])
@pytest.mark.parametrize("family", FAMILIES)
def test_deepspeed_merges_the_slices_of_every_parameter_to_the_whole(
    family: str, tp: int, vocab_size: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    parameters = dict(MaskedLM(small(family, vocab_size)).named_parameters())
    info = universal_checkpoint_info(parameters, vocab_size, tp)
    left = patterns(info)
    for name, parameter in parameters.items():
        full = {state: torch.randn(parameter.shape) for state in STATES}
        slices = {state: cut(value, name, tp) for state, value in full.items()}
        merged, unmatched = merged_by_deepspeed(tmp_path, info, name, slices)
        left &= unmatched
        for state in STATES:
            got = merged[state]
            if name == "head.decoder.bias":  # one dimension: deepspeed leaves the padding, which is zero
                assert got.shape[0] == -(-vocab_size // tp) * tp and not got[vocab_size:].any()
                got = got[:vocab_size]
            assert torch.equal(got, full[state]), (name, state)
    assert not left  # ds_to_universal refuses a pattern that no parameter has


def test_without_the_info_deepspeed_doubles_layer_norms_in_silence(tmp_path: Path) -> None:
    name = "encoder.layers.0.attention_norm.weight"
    slices = {state: [torch.randn(16)] * 2 for state in STATES}
    merged, _ = merged_by_deepspeed(tmp_path / "without", {}, name, slices)
    assert merged["fp32"].shape == (32,)
    info = universal_checkpoint_info([name], 40, 2)
    merged, unmatched = merged_by_deepspeed(tmp_path / "with", info, name, slices)
    assert torch.equal(merged["fp32"], slices["fp32"][0]) and not unmatched


def test_replicated_slices_that_drifted_apart_are_not_merged(tmp_path: Path) -> None:
    name = "encoder.final_norm.weight"
    slices = {state: [torch.ones(16), torch.zeros(16)] for state in STATES}
    with pytest.raises(AssertionError):
        merged_by_deepspeed(tmp_path, universal_checkpoint_info([name], 40, 2), name, slices)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_parameter_of_any_head_matches_two_patterns_and_layers_share_theirs(family: str) -> None:
    found = []
    for layers in (2, 12):
        config = replace(small(family, 40), num_hidden_layers=layers)
        with torch.device("meta"):
            names = {name for head in HEADS.values() for name, _ in head(config).named_parameters()}
        found.append(patterns(universal_checkpoint_info(names, 40, 2)))
        assert all(sum(bool(re.match(pattern, name)) for pattern in found[-1]) <= 1 for name in names)
    assert found[0] == found[1]


def test_a_parameter_in_no_class_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"encoder\.unheard_of\.weight"):
        universal_checkpoint_info(["encoder.unheard_of.weight"], 40, 2)
