"""Language adapters: the routing, the languages of a model, what is frozen."""

import pytest
import torch

from xlscale.config_sections import ModelConfig
from xlscale.models.adapters import route
from xlscale.models.encoder import Encoder
from xlscale.models.families import preset
from xlscale.models.heads import HEADS
from xlscale.models.parts import PLAIN

LANGUAGES = ["en_XX", "de_DE", "sw_KE", "zh_CN"]
SMALL = ModelConfig(
    model_type="xmod",
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
    languages=LANGUAGES,
    adapter_layer_norm=True,
)


def encoder_of(model=SMALL, seed=0):
    torch.manual_seed(seed)
    encoder = Encoder(model).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return encoder


def tokens(rows, length=7):
    return torch.randint(4, 60, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("ids", [[2, 0, 2, 1, 0, 2], [0, 0, 1, 1, 3, 3], [3, 3, 3, 3, 3, 3], [3, 2, 1, 0, 1, 2]])
def test_every_present_adapter_runs_once_per_layer_and_no_other(ids):
    encoder, ran = encoder_of(), []
    for language in LANGUAGES:
        for layer in encoder.layers:
            layer.adapters[language].register_forward_hook(
                lambda _, args, __, language=language: ran.append((language, len(args[0])))
            )
    encoder(tokens(6), lang_ids=torch.tensor(ids))
    once = [(LANGUAGES[i], ids.count(i)) for i in sorted(set(ids))]
    assert ran == once * 2, "sorted by language id, in every layer"


def test_a_mixed_batch_is_each_sample_in_its_language():
    encoder, ids, langs = encoder_of(), tokens(6), [2, 0, 3, 2, 0, 2]
    mixed = encoder(ids, lang_ids=torch.tensor(langs)).last_hidden_state
    for row, language in enumerate(langs):
        alone = encoder(ids[row : row + 1], lang_ids=torch.tensor([language])).last_hidden_state
        torch.testing.assert_close(mixed[row : row + 1], alone, atol=1e-5, rtol=1e-5)
    other = encoder(ids, lang_ids=torch.tensor([1] * 6)).last_hidden_state
    assert not torch.allclose(mixed, other, atol=1e-2), "the language matters"


def test_sorted_rows_are_not_moved():
    device = torch.device("cpu")
    assert route(torch.tensor([0, 0, 2]), 3, SMALL, device) == ([("en_XX", 2), ("sw_KE", 1)], None, None)
    moved = route(torch.tensor([2, 0, 2]), 3, SMALL, device)
    assert moved.groups == [("en_XX", 1), ("sw_KE", 2)]
    assert moved.order_B.tolist() == [1, 0, 2] and moved.back_B.tolist() == [1, 0, 2]


@pytest.mark.parametrize(
    ("lang_ids", "line"),
    [
        (torch.tensor([0, 4]), r"lang_ids holds 4, which has no adapter; use one of: 0 en_XX, 1 de_DE"),
        (torch.tensor([-1, 0]), r"lang_ids holds -1"),
        (torch.tensor([0.0, 1.0]), r"lang_ids is torch.float32 \(2,\); give one integer for each of the 2"),
        (torch.tensor([0]), r"\(1,\); give one integer for each of the 2 samples"),
        (torch.zeros(2, 7, dtype=torch.long), r"\(2, 7\); give one integer"),
        (None, r"pass lang_ids \[2\] or call set_default_language\(\) with one of en_XX, de_DE"),
    ],
)
def test_languages_that_cannot_be_routed_are_refused(lang_ids, line):
    with pytest.raises(ValueError, match=line):
        encoder_of()(tokens(2), lang_ids=lang_ids)


def test_languages_are_refused_where_there_are_no_adapters():
    plain = preset("roberta-base", vocab_size=60, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    encoder = Encoder(plain)
    with pytest.raises(ValueError, match="lang_ids choose among adapters, and a roberta model has none"):
        encoder(tokens(2), lang_ids=torch.tensor([0, 0]))
    with pytest.raises(ValueError, match="no adapter for 'en_XX'; the languages are none"):
        encoder.set_default_language("en_XX")
    with pytest.raises(ValueError, match="has no adapters to freeze"):
        encoder.freeze_embeddings_and_language_adapters()


@pytest.mark.parametrize("head", HEADS)
def test_every_class_sets_its_language_and_freezes(head):
    model = HEADS[head](SMALL, PLAIN).eval()
    with pytest.raises(ValueError, match=r"no adapter for 'fr_XX'; the languages are en_XX, de_DE, sw_KE, zh_CN"):
        model.set_default_language("fr_XX")
    model.set_default_language("sw_KE")
    assert model.config.default_language == "sw_KE", "written with the model"
    ids = tokens(2)
    by_default = model.encoder(ids).last_hidden_state
    assert torch.equal(by_default, model.encoder(ids, lang_ids=torch.tensor([2, 2])).last_hidden_state)

    model.freeze_embeddings_and_language_adapters()
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if ".embeddings." in n or ".adapter" in n}
    assert any("adapter_norm" in name for name in frozen) and any("adapters.zh_CN.up" in name for name in frozen)


def test_an_absent_languages_adapter_gets_no_gradient():
    encoder = encoder_of().train()
    encoder(tokens(4), lang_ids=torch.tensor([3, 0, 3, 0])).last_hidden_state.sum().backward()
    for name, parameter in encoder.named_parameters():
        absent = ".adapters.de_DE." in name or ".adapters.sw_KE." in name
        assert (parameter.grad is None) == absent, name


def test_the_width_of_an_adapter_follows_from_the_factor():
    adapter = encoder_of(ModelConfig(**{**vars(SMALL), "adapter_reduction_factor": 4})).layers[0].adapters["de_DE"]
    assert adapter.down.weight.shape == (4, 16) and adapter.up.weight.shape == (16, 4)
