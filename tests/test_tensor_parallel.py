"""TP_PLAN as a table: every parameter is in a class, and splitting and merging are inverse."""

import pytest
import torch

from xlscale.models.dropout import DropoutKey, KeyedDropout
from xlscale.models.families import PRESETS, preset
from xlscale.models.heads import MaskedLM
from xlscale.parallel.tensor_parallel import TP_PLAN, full_shape, merge_slices, split_dim, tensor_slice


@pytest.mark.parametrize("family", PRESETS)
def test_every_parameter_of_every_family_is_classified_and_splits_back(family: str) -> None:
    with torch.device("meta"):
        model = MaskedLM(preset(family))
    for name, parameter in model.named_parameters():
        local = tensor_slice(parameter, name, 0, 2)
        # An odd vocabulary (RoBERTa's 50265) is refused at the start; it cannot be cut into equal slices.
        if split_dim(name) is None or parameter.shape[split_dim(name) or 0] % 2 == 0:
            assert full_shape(local.shape, name, 2) == tuple(parameter.shape), name


def test_merging_the_slices_gives_the_whole() -> None:
    whole = torch.arange(8 * 12.0).view(8, 12)
    for name in ("encoder.layers.0.mlp.up.weight", "encoder.layers.0.mlp.down.weight", "head.dense.weight"):
        slices = [tensor_slice(whole, name, rank, 4) for rank in range(4)]
        assert torch.equal(merge_slices(slices, name), whole)
    assert tensor_slice(whole, "encoder.layers.0.mlp.down.weight", 1, 4).shape == (8, 3)


def test_parameter_left_out_of_the_plan_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(TP_PLAN, "mlp.up")
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.mlp\.up\.weight is in no class of TP_PLAN"):
        split_dim("encoder.layers.0.mlp.up.weight")


def test_suffix_must_be_a_whole_module_name() -> None:
    with pytest.raises(ValueError, match="no class"):
        split_dim("encoder.layers.0.other_mlp.up_too.weight")


def test_keyed_dropout_is_a_function_of_its_key() -> None:
    key = DropoutKey()
    dropout, other_site = KeyedDropout(0.25, 3, key), KeyedDropout(0.25, 4, key)
    x = torch.ones(64, 64)
    key.set(0, 128)
    first = dropout(x)
    torch.manual_seed(99)
    assert torch.equal(dropout(x), first)
    assert not torch.equal(other_site(x), first)
    key.set(0, 136)
    assert not torch.equal(dropout(x), first)
    assert (first == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert first.max().item() == pytest.approx(1 / 0.75)
    assert torch.equal(dropout.eval()(x), x)
