"""TP_PLAN as a table: every parameter is in a class, and splitting and merging are inverse."""

from contextlib import AbstractContextManager

import pytest
import torch

from xlscale.models.dropout import DropoutKey, KeyedDropout, seeded_attention
from xlscale.models.encoder import Encoder
from xlscale.models.families import PRESETS, preset
from xlscale.models.heads import MaskedLM
from xlscale.models.parts import Parts
from xlscale.parallel.tensor_parallel import (
    OF_OWN_TOKENS,
    TP_PLAN,
    full_shape,
    merge_slices,
    plan_class,
    split_dim,
    tensor_slice,
)

SMALL = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
         "max_position_embeddings": 20}  # fmt: skip


@pytest.mark.parametrize("family", PRESETS)
def test_every_parameter_of_every_family_is_classified_and_splits_back(family: str) -> None:
    with torch.device("meta"):
        model = MaskedLM(preset(family))
    for name, parameter in model.named_parameters():
        # The second rank has one row of padding where a vocabulary is odd, as RoBERTa's 50265.
        local = tensor_slice(parameter, name, 1, 2)
        assert local.shape == tensor_slice(parameter, name, 0, 2).shape
        assert full_shape(local.shape, name, 2, model.config.vocab_size) == tuple(parameter.shape), name


def test_merging_the_slices_gives_the_whole() -> None:
    whole = torch.arange(8 * 12.0).view(8, 12)
    for name in ("encoder.layers.0.mlp.up.weight", "encoder.layers.0.mlp.down.weight", "head.dense.weight"):
        slices = [tensor_slice(whole, name, rank, 4) for rank in range(4)]
        assert torch.equal(merge_slices(slices, name, vocab_size=5), whole)
    assert tensor_slice(whole, "encoder.layers.0.mlp.down.weight", 1, 4).shape == (8, 3)


@pytest.mark.parametrize(("rows", "tp", "last"), [(8, 4, 2), (7, 4, 1), (5, 4, 0), (9, 2, 4)])
def test_vocabulary_that_tp_does_not_divide_is_padded_inside_stripped_outside(rows: int, tp: int, last: int) -> None:
    for name, whole in (
        ("encoder.embeddings.word.weight", torch.arange(1.0, 1 + 3 * rows).view(rows, 3)),
        ("head.decoder.bias", torch.arange(1.0, 1 + rows)),
    ):
        slices = [tensor_slice(whole, name, rank, tp) for rank in range(tp)]
        assert {len(part) for part in slices} == {-(-rows // tp)}
        assert all(part[:last].all() and not part[last:].any() for part in slices[-1:])
        assert torch.equal(merge_slices(slices, name, rows), whole)
        assert full_shape(slices[-1].shape, name, tp, rows) == whole.shape


def test_what_reads_the_residual_stream_sees_its_own_tokens_only() -> None:
    """The table's one fact that no shape shows: whose gradient sequence parallelism must sum."""
    with torch.device("meta"):
        model = MaskedLM(preset("xmod-large-prenorm", add_cross_attention=True, is_decoder=True))
    summed = {name for name, _ in model.named_parameters() if plan_class(name) in OF_OWN_TOKENS}
    of_layer = {name.removeprefix("encoder.layers.0.") for name in summed if ".layers.0." in name}
    norms = ("attention_norm", "cross_attention_norm", "mlp_norm", "adapter_norm")
    biases = {"attention.output.bias", "cross_attention.output.bias", "mlp.down.bias"}
    biases |= {f"adapters.{language}.up.bias" for language in model.config.languages}
    assert of_layer == biases | {f"{norm}.{kind}" for norm in norms for kind in ("weight", "bias")}
    assert {name for name in summed if ".layers." not in name} == {
        "encoder.embeddings.position.weight",
        "encoder.embeddings.token_type.weight",
        "encoder.embeddings.norm.weight",
        "encoder.embeddings.norm.bias",
        "encoder.final_norm.weight",
        "encoder.final_norm.bias",
    }


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


def test_ranks_that_hold_different_elements_drop_different_ones() -> None:
    key, x = DropoutKey(), torch.ones(64, 64)
    key.set(0, 128)
    whole, first, second = (KeyedDropout(0.25, 3, key, share)(x) for share in ((), (0,), (1,)))
    assert not torch.equal(first, second) and not torch.equal(first, whole)


@pytest.mark.parametrize("output_attentions", [False, True])
def test_attention_noise_is_a_function_of_key_place_and_rank(output_attentions: bool) -> None:
    key = DropoutKey()
    sites = []

    def seeded(site: int) -> AbstractContextManager[None]:
        sites.append(site)
        return seeded_attention(site, key, tp_rank=0)

    config = preset("xlm-roberta-base", **SMALL, is_decoder=True, add_cross_attention=True, hidden_dropout_prob=0.0)
    torch.manual_seed(0)
    encoder = Encoder(config, Parts(seeded_attention=seeded))
    given = {"encoder_hidden_states": torch.randn(2, 5, 24), "output_attentions": output_attentions}
    ids = torch.arange(3, 13).view(2, 5)

    def hidden(slot: int) -> torch.Tensor:
        key.set(0, slot)
        torch.rand(slot + 1)  # what others draw does not matter
        return encoder(ids, **given).last_hidden_state

    assert torch.equal(hidden(1), hidden(1))
    assert not torch.equal(hidden(1), hidden(2))
    # Self-attention of each layer, then cross-attention of each: no two places drop alike.
    assert sites[:6] == [0, 3, 1, 4, 2, 5]
    sites.clear()
    encoder.eval()
    assert torch.equal(hidden(1), hidden(2)) and not sites


def run_layers(encoder: Encoder, ids: torch.Tensor, **given: bool) -> int:
    """How often layers ran in one forward and backward."""
    runs = []
    hooks = [layer.register_forward_hook(lambda *_: runs.append(1)) for layer in encoder.layers]
    encoder(ids, **given).last_hidden_state.square().mean().backward()
    for hook in hooks:
        hook.remove()
    return len(runs)


def test_every_kth_layer_is_computed_again_and_nothing_else_changes() -> None:
    config = preset("xlm-roberta-base", **SMALL, is_decoder=True)
    encoder, ids = Encoder(config), torch.arange(3, 13).view(2, 5)
    for every, again in ((0, 0), (1, 3), (2, 2), (3, 1)):
        encoder.recomputed = lambda index, every=every: every > 0 and index % every == 0
        assert run_layers(encoder, ids) == 3 + again
        assert run_layers(encoder, ids, output_attentions=True) == run_layers(encoder, ids, use_cache=True) == 3
    encoder.embeddings.requires_grad_(False)
    encoder.recomputed = lambda index: True
    assert run_layers(encoder, ids) == 5, "a layer whose input has no gradient keeps what it needs"
    assert all(parameter.grad is not None for parameter in encoder.layers[0].parameters())
    encoder.eval()
    assert run_layers(encoder, ids) == 3
