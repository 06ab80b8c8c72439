"""The heads by themselves: shapes, losses worked out by hand, refusals, generation with and without cache."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from xlscale.checkpoint.head_names import HEAD_NAMES, as_written, head_hf_name
from xlscale.data.masking import IGNORE
from xlscale.models.bare import Model
from xlscale.models.classification import (
    ForMultipleChoice,
    ForQuestionAnswering,
    ForSequenceClassification,
    ForTokenClassification,
)
from xlscale.models.families import preset
from xlscale.models.heads import HEADS, ForMaskedLM, MaskedLM, head_shapes
from xlscale.models.lm import ForCausalLM
from xlscale.models.parts import Parts

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
XMOD = {"model_type": "xmod", "languages": ["en_XX", "de_DE", "sw_KE"], "default_language": "en_XX"}
FAMILIES = {
    "roberta": {"model_type": "roberta"},
    "xl": {"model_type": "xlm-roberta-xl"},
    "xmod": XMOD,
    "xmod-pre": {**XMOD, "pre_norm": True, "adapter_layer_norm": True, "adapter_reduction_factor": 4},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_head = pytest.mark.parametrize("head", HEADS)


def small(family="roberta", **changes):
    return replace(preset("xlm-roberta-base"), **{**SMALL, **FAMILIES[family], **changes})


def noisy(model, seed=0):
    """Every parameter away from its initial value; positions loud, so that a decoder's tokens differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "position." in name else 0.3 if parameter.dim() > 1 else 0.03
            ones = name.endswith("norm.weight")
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale + ones)
    return model.eval()


def tokens(*shape, seed=0):
    return torch.randint(4, 60, shape, generator=torch.Generator().manual_seed(seed))


def inputs_of(head):
    return tokens(2, 3, 7) if head == "ForMultipleChoice" else tokens(2, 7)


@every_head
@every_family
def test_shapes_of_the_table_are_those_of_the_class_and_every_parameter_has_a_name(family, head):
    config = small(family, num_labels=2 if head == "ForQuestionAnswering" else 3)
    model = HEADS[head](config)
    assert model.architecture == head and model.config == config
    outside = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith("encoder.")}
    assert outside == head_shapes(config, head)
    names = [as_written(head_hf_name(name), head) for name in outside]
    assert len(set(names)) == len(names)
    assert not any("lm_head.decoder" in name for name in names), "the tied weight and bias are never written"


def test_bare_model_without_pooler_has_nothing_outside_the_encoder():
    config = small()
    model = Model(config, pooler=False)
    assert head_shapes(config, "Model", pooler=False) == {}
    assert all(name.startswith("encoder.") for name, _ in model.named_parameters())
    assert model(tokens(2, 5)).pooler_output is None
    assert Model(config)(tokens(2, 5)).pooler_output.shape == (2, 16)
    assert as_written("roberta.pooler.dense.weight", "Model") == "pooler.dense.weight"
    assert HEAD_NAMES["pooler.dense"] == "roberta.pooler.dense"


@every_head
def test_states_and_weights_come_with_every_head_when_asked_for(head):
    model = noisy(HEADS[head](small()))
    output = model(inputs_of(head), output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 3 and len(output.attentions) == 2
    rows = 6 if head == "ForMultipleChoice" else 2
    assert {state.shape for state in output.hidden_states} == {(rows, 7, 16)}
    plain = model(inputs_of(head))
    assert plain.hidden_states is None and plain.attentions is None
    scores = [field for field in ("logits", "start_logits", "last_hidden_state") if hasattr(plain, field)]
    for field in scores:
        torch.testing.assert_close(getattr(output, field), getattr(plain, field), atol=1e-5, rtol=1e-5)


@every_head
def test_a_misspelt_argument_is_refused(head):
    with pytest.raises(TypeError, match="atention_mask"):
        HEADS[head](small())(inputs_of(head), atention_mask=None)


@every_head
def test_every_head_runs_from_embeddings_too(head):
    model, ids = noisy(HEADS[head](small())), inputs_of(head)
    embeds = model.encoder.embeddings.word(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds)[1], model(ids)[1], atol=1e-5, rtol=1e-5)


def test_masked_lm_of_the_hub_and_of_training_agree():
    config = small("xl")
    ours = noisy(ForMaskedLM(config))
    training = MaskedLM(config)
    training.eval().load_state_dict(ours.state_dict())
    ids = tokens(3, 8)
    labels = ids.masked_fill(torch.rand(3, 8, generator=torch.Generator().manual_seed(1)) < 0.6, IGNORE)
    output = ours(ids, labels=labels)
    torch.testing.assert_close(output.loss, training(ids, labels).losses_M.mean())
    torch.testing.assert_close(output.logits, training.logits(ids))
    torch.testing.assert_close(ours.logits(ids), output.logits)
    assert ours(ids).loss is None


def test_nothing_labelled_is_a_loss_of_zero_and_not_a_nan():
    ids = tokens(2, 5)
    nothing = torch.full_like(ids, IGNORE)
    far = torch.tensor([5, 99])
    for model, labels in (
        (ForMaskedLM(small()), {"labels": nothing}),
        (ForCausalLM(small(is_decoder=True)), {"labels": nothing}),
        (ForTokenClassification(small()), {"labels": nothing}),
        (ForSequenceClassification(small()), {"labels": nothing[:, 0]}),
        (ForQuestionAnswering(small()), {"start_positions": far, "end_positions": far}),
    ):
        loss = model(ids, **labels).loss
        loss.backward()
        assert loss == 0 and not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def test_causal_loss_is_of_the_next_token():
    model, ids = noisy(ForCausalLM(small(is_decoder=True))), tokens(2, 6)
    output = model(ids, labels=ids)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)
    assert output.past_key_values is None, "no cache beside labels"


def test_an_encoder_gives_no_cache_and_a_decoder_as_its_config_says():
    ids = tokens(2, 5)
    assert Model(small())(ids).past_key_values is None
    assert Model(small(is_decoder=True))(ids).past_key_values is not None
    assert Model(small(is_decoder=True))(ids, use_cache=False).past_key_values is None
    assert Model(small(is_decoder=True, use_cache=False))(ids).past_key_values is None


@pytest.mark.parametrize("problem", ["regression", "single_label_classification", "multi_label_classification"])
@pytest.mark.parametrize("inferred", [False, True])
def test_sequence_losses(problem, inferred):
    count = 1 if inferred and problem == "regression" else 3
    model = noisy(ForSequenceClassification(small(num_labels=count, problem_type="" if inferred else problem)))
    ids = tokens(4, 6)
    logits = model(ids).logits
    assert logits.shape == (4, count)
    if problem == "single_label_classification":
        labels = torch.tensor([0, 2, 1, 2])
        expected = -logits.log_softmax(1)[torch.arange(4), labels].mean()
    elif problem == "regression":
        labels = torch.linspace(-1, 1, 4 * count).view(4, count)
        expected = ((logits - labels) ** 2).mean()
    else:
        labels = (torch.arange(12).view(4, 3) % 2).float()
        expected = -(labels * F.logsigmoid(logits) + (1 - labels) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(model(ids, labels=labels).loss, expected)
    if problem == "regression" and count == 1:
        torch.testing.assert_close(model(ids, labels=labels[:, 0]).loss, expected)


def test_labels_that_would_be_broadcast_are_refused():
    model = ForSequenceClassification(small(num_labels=3, problem_type="regression"))
    with pytest.raises(ValueError, match=r"labels \(2,\) do not fit logits \(2, 3\); give one per logit"):
        model(tokens(2, 4), labels=torch.zeros(2))


def test_xl_alone_leaves_out_the_labels_of_tokens_that_are_not_attended_to():
    """As transformers: in the other families only -100 does."""
    ids, labels = tokens(2, 5), torch.zeros(2, 5, dtype=torch.long)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    for family, attended_only in (("xl", True), ("roberta", False)):
        model = noisy(ForTokenClassification(small(family)))
        losses = F.cross_entropy(model(ids, mask).logits.flatten(0, 1), labels.flatten(), reduction="none")
        counted = losses[mask.flatten() == 1] if attended_only else losses
        torch.testing.assert_close(model(ids, mask, labels=labels).loss, counted.mean())


def test_question_positions_beyond_the_text_are_ignored():
    model, ids = noisy(ForQuestionAnswering(small())), tokens(3, 6)
    output = model(ids, start_positions=torch.tensor([1, 6, 0]), end_positions=torch.tensor([[3], [80], [7]]))
    start = F.cross_entropy(output.start_logits[[0, 2]], torch.tensor([1, 0]))
    end = F.cross_entropy(output.end_logits[:1], torch.tensor([3]))
    torch.testing.assert_close(output.loss, (start + end) / 2)
    assert model(ids, start_positions=torch.tensor([1, 2, 3])).loss is None, "both are needed"
    with pytest.raises(ValueError, match="num_labels=3 must be 2"):
        ForQuestionAnswering(small(num_labels=3))


def test_choices_take_a_language_per_sample_or_per_choice():
    model, ids = noisy(ForMultipleChoice(small("xmod"))), tokens(2, 3, 6)
    per_sample = model(ids, lang_ids=torch.tensor([2, 1])).logits
    per_choice = model(ids, lang_ids=torch.tensor([[2, 2, 2], [1, 1, 1]])).logits
    torch.testing.assert_close(per_sample, per_choice)
    for row, language in ((0, "sw_KE"), (1, "de_DE")):
        model.set_default_language(language)
        torch.testing.assert_close(model(ids[row : row + 1]).logits[0], per_sample[row], atol=1e-5, rtol=1e-5)
    mixed = model(ids, lang_ids=torch.tensor([[0, 1, 2], [1, 1, 1]])).logits
    assert not torch.allclose(mixed[0], per_sample[0]) and torch.allclose(mixed[1], per_sample[1])
    for wrong in (torch.zeros(3, dtype=torch.long), torch.zeros(6, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"must be one per sample, \(2,\), or per choice, \(2, 3\)"):
            model(ids, lang_ids=wrong)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model()


@every_head
def test_default_language_and_freezing_work_on_every_head(head):
    model = HEADS[head](small("xmod-pre"))
    with pytest.raises(ValueError, match=r"fr_XX.*en_XX"):
        model.set_default_language("fr_XX")
    model.set_default_language("de_DE")
    assert model.config.default_language == "de_DE", "and it is written to the Hub so"
    model.freeze_embeddings_and_language_adapters()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".embeddings." in n or ".adapter" in n}
    assert any(".adapters." in name for name in frozen) and any(".adapter_norm." in name for name in frozen)


@every_head
def test_dropout_of_the_heads_is_keyed_apart_from_the_encoders(head):
    sites, dropouts = [], []

    def dropout(p, site):
        sites.append(site)
        dropouts.append(nn.Dropout(p))
        return dropouts[-1]

    model = HEADS[head](small(hidden_dropout_prob=0.2, classifier_dropout=0.3), Parts(dropout=dropout))
    assert len(set(sites)) == len(sites)
    own = {site: drop.p for site, drop in zip(sites, dropouts, strict=True) if site < 0}
    expected = {
        "ForSequenceClassification": {-1: 0.3, -2: 0.3},
        "ForTokenClassification": {-1: 0.3},
        "ForMultipleChoice": {-1: 0.2},
    }
    assert own == expected.get(head, {})
    for drop in dropouts:
        drop.p = 0.0
    model.train()
    ids = inputs_of(head)
    for site, drop in zip(sites, dropouts, strict=True):
        if site < 0:
            drop.p = 0.5
            assert not torch.equal(model(ids)[1], model(ids)[1]), f"site {site} drops nothing"
            drop.p = 0.0


@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@every_family
def test_generation_with_cache_equals_generation_without_to_the_token(family, padded, cross):
    model = noisy(ForCausalLM(small(family, is_decoder=True, add_cross_attention=cross)))
    prompts = tokens(3, 5, seed=4)
    extra = {}
    if "xmod" in family:
        extra["lang_ids"] = torch.tensor([2, 0, 1])
    if cross:
        extra["encoder_hidden_states"] = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(5))
        extra["encoder_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    if padded:
        prompts[1, :2] = 1
        prompts[2, :4] = 1
    cached = model.generate(prompts, max_new_tokens=12, **extra)
    uncached = model.generate(prompts, max_new_tokens=12, use_cache=False, **extra)
    assert torch.equal(cached, uncached)
    assert cached.shape[1] > 5 and torch.equal(cached[:, :5], prompts)
    assert len(set(cached[:, 5:].flatten().tolist())) > 2, "the comparison needs tokens that differ"
    # The same from a plain loop over one row at a time, without the padding.
    for row in range(3):
        real = prompts[row][prompts[row] != 1][None]
        alone = {name: value[row : row + 1] for name, value in extra.items()}
        for token in cached[row, 5:].tolist():
            best = model(real, **alone).logits[:, -1].argmax(-1)
            assert best.item() == token
            real = torch.cat([real, best[:, None]], dim=1)
            if token == model.config.eos_token_id:
                break


def test_generation_ends_each_row_with_its_eos_and_fills_with_padding():
    model = noisy(ForCausalLM(small(is_decoder=True)))
    free = model.generate(tokens(4, 3), max_new_tokens=8)
    eos = free[0, 5].item()
    model = noisy(ForCausalLM(small(is_decoder=True, eos_token_id=eos)))
    stopped = model.generate(tokens(4, 3), max_new_tokens=8)
    first = free[0, 3:].tolist().index(eos) + 3
    assert stopped[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(stopped[0, first + 1 :].tolist()) <= {1}
    alone = model.generate(tokens(4, 3)[:1], max_new_tokens=8)
    assert alone.shape[1] == first + 1, "nothing is left to generate"


def test_generation_refuses_what_it_would_get_wrong():
    decoder = ForCausalLM(small(is_decoder=True))
    with pytest.raises(ValueError, match=r"is_decoder = false.*set is_decoder = true"):
        ForCausalLM(small()).generate(tokens(1, 3), max_new_tokens=2)
    with pytest.raises(ValueError, match="pad on the left"):
        decoder.generate(torch.tensor([[5, 6, 1]]), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"20 tokens and max_new_tokens=3.*22.*at most 2"):
        decoder.generate(tokens(1, 20), max_new_tokens=3)
    assert decoder.generate(tokens(1, 20), max_new_tokens=2).shape[1] <= 22
