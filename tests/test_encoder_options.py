"""The encoder's arguments without transformers: what is refused, rows that see nothing, caches, masks, heads."""

import pytest
import torch

from xlscale.models.encoder import Encoder
from xlscale.models.families import preset

SMALL = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3,
         "intermediate_size": 40, "max_position_embeddings": 20, "type_vocab_size": 2}  # fmt: skip
DECODER = {"is_decoder": True, "add_cross_attention": True}
POSITIONS = ("absolute", "relative_key", "relative_key_query")


def encoder_of(name="xlm-roberta-base", **changes):
    torch.manual_seed(0)
    encoder = Encoder(preset(name, **SMALL, **changes)).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def tokens(rows=3, length=8):
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(1))


IDS, STATES = tokens(), torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(2))
REFUSED = {
    "nothing": ({}, {}, "give either input_ids or inputs_embeds"),
    "both": ({}, {"input_ids": IDS, "inputs_embeds": torch.zeros(3, 8, 24)}, "give either input_ids or inputs_embeds"),
    "short mask": ({}, {"attention_mask": torch.ones(3, 7)}, r"shape \(3, 7\); these inputs need \[3, 8\]"),
    "turned mask": ({}, {"attention_mask": torch.ones(8, 3)}, r"shape \(8, 3\)"),
    "square mask": ({}, {"attention_mask": torch.ones(3, 8, 7)}, r"shape \(3, 8, 7\); these inputs need \[3, 8, 8\]"),
    "cube": ({}, {"attention_mask": torch.ones(3, 1, 8, 8)}, r"shape \(3, 1, 8, 8\)"),
    "heads": ({}, {"head_mask": torch.ones(4)}, r"head_mask has shape \(4,\); give \[3\] or \[2, 3\]"),
    "cache of an encoder": ({}, {"use_cache": True}, "set is_decoder in the config"),
    "past of an encoder": ({}, {"past_key_values": ()}, "set is_decoder in the config"),
    "past of others": (DECODER, {"past_key_values": ()}, "past_key_values are of 0 layers; this model has 2"),
    "states of an encoder": ({}, {"encoder_hidden_states": STATES}, "need cross-attention; set is_decoder and"),
    "states of a plain decoder": ({"is_decoder": True}, {"encoder_hidden_states": STATES}, "need cross-attention"),
    "mask without states": (DECODER, {"encoder_attention_mask": torch.ones(3, 5)}, "without encoder_hidden_states"),
    "mask of other states": (
        DECODER,
        {"encoder_hidden_states": STATES, "encoder_attention_mask": torch.ones(3, 8)},
        r"encoder_attention_mask has shape \(3, 8\); these inputs need \[3, 5\]",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_model_has_no_use_for_is_refused(case):
    changes, given, line = REFUSED[case]
    if case not in ("nothing", "both"):
        given = {"input_ids": IDS, **given}
    with pytest.raises(ValueError, match=line):
        encoder_of(**changes)(**given)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("name", ["xlm-roberta-base", "xlm-roberta-xl"])
def test_a_row_that_sees_nothing_is_finite_and_the_same_with_and_without_weights(name, positions):
    """The first tokens of a decoder's prompts that are padded on the left."""
    encoder = encoder_of(name, is_decoder=True, position_embedding_type=positions)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0] * 7 + [1]])
    fused, explicit = (encoder(IDS, mask, output_attentions=weights) for weights in (False, True))
    torch.testing.assert_close(fused.last_hidden_state, explicit.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not explicit.attentions[0][0, :, :3].any() and not explicit.attentions[0].triu(1).any()
    torch.testing.assert_close(explicit.attentions[1][1].sum(-1), torch.ones(3, 8))
    for output in (fused, explicit):
        encoder.zero_grad()
        output.last_hidden_state[mask.bool()].square().sum().backward()
        assert all(p.grad.isfinite().all() for p in encoder.parameters() if p.grad is not None)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("changes", [{"is_decoder": True}, DECODER])
def test_tokens_in_pieces_give_what_they_give_at_once(changes, positions):
    encoder = encoder_of(**changes, position_embedding_type=positions)
    states = {"encoder_hidden_states": STATES} if "add_cross_attention" in changes else {}
    whole = encoder(IDS, use_cache=True, **states)
    embeds = encoder.embeddings.word(IDS)
    for given in ("input_ids", "inputs_embeds"):
        past, found = None, []
        for start, stop in ((0, 3), (3, 4), (4, 8)):
            piece = (IDS if given == "input_ids" else embeds)[:, start:stop]
            output = encoder(**{given: piece}, past_key_values=past, use_cache=True, **states)
            past = output.past_key_values
            found.append(output.last_hidden_state)
        torch.testing.assert_close(torch.cat(found, dim=1), whole.last_hidden_state, atol=1e-5, rtol=1e-5)
        for layer, expected in zip(past, whole.past_key_values, strict=True):
            assert len(layer) == (4 if states else 2)
            for tensor, other in zip(layer, expected, strict=True):
                torch.testing.assert_close(tensor, other, atol=1e-5, rtol=1e-5)


def test_the_cache_counts_against_the_longest_sequence():
    encoder = encoder_of(is_decoder=True)
    past = encoder(tokens(1, 17), use_cache=True).past_key_values
    past = encoder(tokens(1, 1), past_key_values=past, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="a sequence of 19 tokens is longer than the model's 18"):
        encoder(tokens(1, 1), past_key_values=past)


def test_relative_positions_take_as_many_tokens_as_there_are_distances():
    encoder = encoder_of(position_embedding_type="relative_key")
    assert encoder(tokens(1, 20)).last_hidden_state.isfinite().all()
    with pytest.raises(ValueError, match=r"21 tokens is longer than the model's 20; .*\(tokens\)"):
        encoder(tokens(1, 21))


def test_a_causal_model_sees_nothing_that_comes_later():
    encoder, ids = encoder_of(is_decoder=True), IDS.clone()
    before = encoder(ids).last_hidden_state
    ids[:, 5] = 4 + ids[:, 5] % 50
    after = encoder(ids).last_hidden_state
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


def test_masks_of_every_form_and_dtype_are_the_same():
    encoder = encoder_of()
    mask = (torch.arange(8) < torch.tensor([8, 5, 2])[:, None]).long()
    expected = encoder(IDS, mask).last_hidden_state
    for same in (mask.bool(), mask.float(), mask[:, None].expand(3, 8, 8)):
        torch.testing.assert_close(encoder(IDS, same).last_hidden_state, expected)


def test_a_head_that_is_masked_changes_nothing_any_more():
    encoder = encoder_of()
    mask = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    before = encoder(IDS, head_mask=mask, output_attentions=True)
    with torch.no_grad():
        encoder.layers[0].attention.value.weight[8:16].add_(1.0)
    after = encoder(IDS, head_mask=mask)
    torch.testing.assert_close(before.last_hidden_state, after.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not before.attentions[0][:, 1].any()
    assert not torch.allclose(encoder(IDS).last_hidden_state, after.last_hidden_state, atol=1e-3)


def test_attention_weights_are_dropped_in_training_also_when_they_are_asked_for():
    encoder = encoder_of(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0).train()
    weights = encoder(IDS, output_attentions=True).attentions[0]
    assert 0.3 < (weights == 0).float().mean() < 0.7


@pytest.mark.parametrize("positions", POSITIONS)
def test_bf16_runs_with_every_kind_of_position(positions):
    encoder = encoder_of(position_embedding_type=positions, is_decoder=True).bfloat16()
    mask = (torch.arange(8) < torch.tensor([8, 5, 2])[:, None]).long()
    for weights in (False, True):
        output = encoder(IDS, mask, output_attentions=weights, head_mask=torch.ones(3))
        assert output.last_hidden_state.dtype == torch.bfloat16 and output.last_hidden_state.isfinite().all()
