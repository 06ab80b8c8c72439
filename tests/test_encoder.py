"""The encoder and the masked LM head: masks, positions, dropout sites, the masked-only head."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xlscale.data.masking import IGNORE
from xlscale.models.encoder import Encoder
from xlscale.models.families import LAYOUTS, preset
from xlscale.models.heads import MaskedLM
from xlscale.models.parts import Parts

SMALL = {
    "vocab_size": 90,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 20,
}
FAMILIES = sorted(LAYOUTS)
OF_FAMILY = {"xmod": {"languages": ["en_XX", "de_DE"], "default_language": "de_DE", "adapter_layer_norm": True}}


# Embeddings, and two in each of two layers; one more with an adapter.
SITES = {family: 7 if family == "xmod" else 5 for family in FAMILIES}


def small(family, **changes):
    return replace(preset("xlm-roberta-xl"), **{**SMALL, "model_type": family, **OF_FAMILY.get(family, {}), **changes})


def noisy(model_config, seed=0):
    """A model in eval mode with every parameter away from its initial value, biases and norms too."""
    torch.manual_seed(seed)
    model = MaskedLM(model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(rows, length, seed=0):
    return torch.randint(4, 90, (rows, length), generator=torch.Generator().manual_seed(seed))


def hidden(encoder, ids):
    return encoder(ids).last_hidden_state


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_no_real_token(family):
    model = noisy(small(family))
    ids = tokens(2, 9)
    padded = F.pad(ids, (0, 4), value=1)
    mask = F.pad(torch.ones(2, 9, dtype=torch.bool), (0, 4))
    torch.testing.assert_close(model.logits(padded, mask)[:, :9], model.logits(ids), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model.logits(padded)[:, :9], model.logits(ids), atol=1e-3), "the mask matters"


@pytest.mark.parametrize("family", FAMILIES)
def test_full_mask_equals_no_mask(family):
    model, ids = noisy(small(family)), tokens(3, 8)
    for mask in (torch.ones(3, 8, dtype=torch.bool), torch.ones(3, 8, dtype=torch.int64)):
        torch.testing.assert_close(model.logits(ids, mask), model.logits(ids), atol=1e-5, rtol=1e-5)


def test_first_token_is_at_pad_plus_one_and_padding_at_pad():
    model = noisy(small("xlm-roberta-xl"))
    seen = []
    model.encoder.embeddings.position.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    model.encoder(torch.tensor([[0, 7, 8, 2, 1, 1], [0, 9, 2, 1, 1, 1]]))
    assert seen[0].tolist() == [[2, 3, 4, 5, 1, 1], [2, 3, 4, 1, 1, 1]]


def test_longest_sequence_runs_and_one_more_token_is_refused():
    encoder = Encoder(small("roberta"))
    assert encoder(tokens(1, 18)).last_hidden_state.shape == (1, 18, 24)
    with pytest.raises(ValueError, match=r"19 tokens.*18.*max_position_embeddings"):
        encoder(tokens(1, 19))


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_positions_alone_give_the_losses_of_all_positions(family):
    model, ids = noisy(small(family)), tokens(4, 10)
    labels = torch.where(torch.rand(4, 10, generator=torch.Generator().manual_seed(1)) < 0.3, ids, IGNORE)
    output = model(ids, labels)
    logits = model.logits(ids)
    chosen = labels != IGNORE
    expected = F.cross_entropy(logits[chosen], labels[chosen], reduction="none")
    torch.testing.assert_close(output.losses_M, expected, atol=1e-5, rtol=1e-5)
    assert output.losses_M.dtype == torch.float32
    assert output.rows_M.tolist() == chosen.nonzero()[:, 0].tolist()
    assert output.correct_M.tolist() == (logits[chosen].argmax(-1) == labels[chosen]).tolist()
    torch.testing.assert_close(model.logits(ids, positions=chosen), logits[chosen], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_without_a_masked_token_gives_every_parameter_a_zero_gradient(family):
    model, ids = noisy(small(family)).train(), tokens(2, 6)
    output = model(ids, torch.full_like(ids, IGNORE))
    assert output.losses_M.numel() == output.rows_M.numel() == output.correct_M.numel() == 0
    output.losses_M.sum().backward()
    for name, parameter in model.named_parameters():
        unused = ".adapters.en_XX." in name  # not of the batch's language
        assert parameter.grad is None if unused else parameter.grad is not None and not parameter.grad.any(), name


def test_losses_are_fp32_when_the_model_is_bf16():
    model, ids = noisy(small("xlm-roberta")).bfloat16(), tokens(2, 6)
    assert model(ids, ids).losses_M.dtype == torch.float32


def test_decoder_weight_is_the_word_embedding():
    model = noisy(small("roberta"))
    assert model.head.decoder.weight is model.encoder.embeddings.word.weight
    assert "head.decoder.weight" not in dict(model.named_parameters())
    ids = tokens(2, 6)
    model(ids, ids).losses_M.sum().backward()
    rows = model.encoder.embeddings.word.weight.grad
    assert rows[89].any() or 89 in ids, "a piece that is not in the batch learns through the decoder"
    # Nothing is looked up at the padding row: what it gets comes from the decoder only, as in transformers.
    with_padding = F.pad(ids, (0, 2), value=1)
    model.zero_grad()
    model(with_padding, F.pad(ids, (0, 2), value=IGNORE), with_padding != 1).losses_M.sum().backward()
    torch.testing.assert_close(model.encoder.embeddings.word.weight.grad, rows, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_sites_are_the_running_numbers_of_embeddings_attention_and_feed_forward(family):
    sites = []

    def dropout(p, site):
        sites.append((site, p))
        return nn.Dropout(p)

    MaskedLM(small(family, hidden_dropout_prob=0.25), Parts(dropout=dropout))
    assert sorted(sites) == [(site, 0.25) for site in range(SITES[family])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_dropout_is_active_in_training_and_off_in_evaluation(family):
    ids = tokens(2, 8)
    for sites_on in range(SITES[family]):
        parts = Parts(dropout=lambda p, site, on=sites_on: nn.Dropout(p if site == on else 0.0))
        torch.manual_seed(0)
        encoder = Encoder(small(family, attention_probs_dropout_prob=0.0), parts)
        assert not torch.equal(hidden(encoder, ids), hidden(encoder, ids)), f"site {sites_on} drops nothing"
        encoder.eval()
        assert torch.equal(hidden(encoder, ids), hidden(encoder, ids))
    encoder = Encoder(small(family, hidden_dropout_prob=0.0))
    assert not torch.equal(hidden(encoder, ids), hidden(encoder, ids)), "attention weights are not dropped"
    encoder.eval()
    assert torch.equal(hidden(encoder, ids), hidden(encoder, ids))


def test_local_heads_follow_from_the_column_layers_width():
    """A third of the heads, as a tensor-parallel rank has them, runs with the model unchanged."""
    parts = Parts(column=lambda i, o: nn.Linear(i, o // 3), row=lambda i, o: nn.Linear(i // 3, o))
    model = small("xlm-roberta-xl", intermediate_size=42)
    assert Encoder(model, parts)(tokens(2, 5)).last_hidden_state.shape == (2, 5, 24)


def test_unknown_activation_names_the_known_ones():
    with pytest.raises(ValueError, match=r"hidden_act='swish2'.*use one of.*gelu"):
        Encoder(small("roberta", hidden_act="swish2"))


def test_token_type_row_is_always_added():
    model, ids = noisy(small("xlm-roberta-xl")), tokens(1, 5)
    before = hidden(model.encoder, ids)
    with torch.no_grad():
        model.encoder.embeddings.token_type.weight.add_(torch.randn(1, 24))
    assert not torch.allclose(before, hidden(model.encoder, ids), atol=1e-3)
