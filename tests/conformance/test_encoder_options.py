"""The encoder's arguments and config fields against transformers: hidden states, attention weights, caches.

What only one version has is compared with that one: relative positions, head_mask and 3-D masks with 4.56.2.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.versions import NEW, OLD, both_versions
from xlscale.checkpoint.hub_config import CLASSES, hub_config, read_head, read_hub_config
from xlscale.checkpoint.hub_names import hf_names
from xlscale.config_sections import ModelConfig
from xlscale.models.encoder import Encoder

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 30,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-3,
}
ADAPTERS = {"model_type": "xmod", "languages": ["en_XX", "de_DE", "sw_KE"], "default_language": "de_DE"}
FAMILIES = {
    "roberta": {"model_type": "roberta"},
    "xlm-roberta": {"model_type": "xlm-roberta"},
    "xlm-roberta-xl": {"model_type": "xlm-roberta-xl"},
    "xmod": ADAPTERS,
    "xmod-prenorm": ADAPTERS
    | {"pre_norm": True, "adapter_layer_norm": True, "ln_before_adapter": False, "adapter_reduction_factor": 4},
}
every_family = pytest.mark.parametrize("family", FAMILIES)
EAGER = {"attn_implementation": "eager"}
B, T, S = 4, 11, 6
DECODER = {"is_decoder": True, "add_cross_attention": True}


def config_of(family, **changes):
    return ModelConfig(**{**SMALL, **FAMILIES[family], **changes})


def our_encoder(folder, config):
    """Our encoder with the weights of a bare model's folder, which must hold no other tensor of an encoder's."""
    assert read_hub_config(folder / "config.json") == config
    tensors = load_file(folder / "model.safetensors")
    encoder = Encoder(config)
    names = {ours.removeprefix("encoder."): name for ours, name in hf_names(config, "Model", pooler=False).items()}
    encoder.load_state_dict({ours: tensors.pop(name) for ours, name in names.items()})
    assert not {name for name in tensors if not name.startswith("pooler.")}
    return encoder.eval()


def made(reference, version, folder, config, calls, options=EAGER):
    kind = f"{CLASSES[config.model_type]}Model"
    return reference(version).make(folder, kind, hub_config(config, "float32", "Model"), calls, options=options).calls


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([11, 8, 5, 1])
    mask = (torch.arange(T) < lengths[:, None]).long()
    return {
        "ids": torch.randint(5, 97, (B, T), generator=generator),
        "mask": mask,
        "embeds": torch.randn(B, T, 24, generator=generator),
        "types": torch.randint(0, 2, (B, T), generator=generator),
        "positions": torch.randint(2, 30, (B, T), generator=generator),
        "seen": (torch.rand(B, T, T, generator=generator) < 0.6).long() | torch.eye(T, dtype=torch.long),
        "states": torch.randn(B, S, 24, generator=generator),
        "states_mask": (torch.arange(S) < torch.tensor([6, 4, 1, 3])[:, None]).long(),
        "heads": torch.rand(2, 3, generator=generator),
    }


def flat(output):
    """Our tensors by the reference's dotted names."""
    found = {"last_hidden_state": output.last_hidden_state}
    for name in ("hidden_states", "attentions", "cross_attentions"):
        found |= {f"{name}.{i}": tensor for i, tensor in enumerate(getattr(output, name) or ())}
    for i, layer in enumerate(output.past_key_values or ()):
        found |= {f"past_key_values.{i}.{j}": tensor for j, tensor in enumerate(layer)}
    return found


def assert_same(output, expected, rows=None):
    """Every tensor of both; `rows` (bool [B, T]) where only those tokens mean anything."""
    found = flat(output)
    assert found.keys() == expected.keys() - {"pooler_output"}
    for name, tensor in found.items():
        assert tensor.shape == expected[name].shape, name
        chosen = rows if rows is not None and "hidden" in name else slice(None)
        torch.testing.assert_close(tensor[chosen], expected[name][chosen], atol=1e-5, rtol=1e-5, msg=name)


@both_versions
@every_family
def test_every_argument_of_an_encoder(reference, version, family, tmp_path):
    t, config = tensors(), config_of(family)
    padded = t["ids"].where(t["mask"].bool(), torch.tensor(1))
    everything = {"output_attentions": True, "output_hidden_states": True}
    calls = [
        {"input_ids": t["ids"]},
        {"input_ids": t["ids"], **everything},
        {"input_ids": padded, "attention_mask": t["mask"], **everything},
        {"inputs_embeds": t["embeds"], "attention_mask": t["mask"]},
        {"input_ids": t["ids"], "token_type_ids": t["types"], "position_ids": t["positions"]},
    ]
    if version == OLD:
        calls += [
            {"input_ids": t["ids"], "attention_mask": t["seen"], **everything},
            {"input_ids": t["ids"], "head_mask": t["heads"], **everything},
            {"input_ids": t["ids"], "head_mask": t["heads"][0], "attention_mask": t["mask"]},
        ]
    expected = made(reference, version, tmp_path, config, calls)
    encoder = our_encoder(tmp_path, config)
    for call, outputs in zip(calls, expected, strict=True):
        output = encoder(**call)
        assert_same(output, outputs)
        if "output_attentions" in call:  # the fused kernel and the explicit weights are the same attention
            plain = encoder(**{**call, "output_attentions": False})
            torch.testing.assert_close(plain.last_hidden_state, output.last_hidden_state, atol=1e-5, rtol=1e-5)


@both_versions
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu_new"])
@pytest.mark.parametrize("family", ["roberta", "xmod"])
def test_activations(reference, version, family, activation, tmp_path):
    config, call = config_of(family, hidden_act=activation), {"input_ids": tensors()["ids"]}
    expected = made(reference, version, tmp_path, config, [call])
    assert_same(our_encoder(tmp_path, config)(**call), expected[0])


@pytest.mark.parametrize("positions", ["relative_key", "relative_key_query"])
@every_family
def test_relative_positions(reference, family, positions, tmp_path):
    t, config = tensors(), config_of(family, position_embedding_type=positions)
    calls = [
        {"input_ids": t["ids"], "output_attentions": True},
        {"input_ids": t["ids"], "attention_mask": t["mask"]},
        {"input_ids": t["ids"], "attention_mask": t["mask"], "head_mask": t["heads"], "output_attentions": True},
    ]
    expected = made(reference, OLD, tmp_path, config, calls)
    encoder = our_encoder(tmp_path, config)
    for call, outputs in zip(calls, expected, strict=True):
        assert_same(encoder(**call), outputs)
    torch.testing.assert_close(
        encoder(t["ids"]).last_hidden_state, expected[0]["last_hidden_state"], atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("positions", ["relative_key", "relative_key_query"])
def test_relative_positions_of_a_decoder(reference, positions, tmp_path):
    """Distances in the cache too; the first call of transformers 4.56.2 with a cache has them wrong, so without."""
    t, config = tensors(), config_of("roberta", position_embedding_type=positions, **DECODER)
    calls = [
        {"input_ids": t["ids"], "use_cache": False},
        {"input_ids": t["ids"], "use_cache": False, "encoder_hidden_states": t["states"], "output_attentions": True},
    ]
    expected = made(reference, OLD, tmp_path, config, calls)
    encoder = our_encoder(tmp_path, config)
    for call, outputs in zip(calls, expected, strict=True):
        assert_same(encoder(**call), outputs)
    past, steps = None, []
    for piece in t["ids"].split([4, 1, 3, 1, 2], dim=1):
        output = encoder(piece, past_key_values=past, use_cache=True)
        past, steps = output.past_key_values, [*steps, output.last_hidden_state]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected[0]["last_hidden_state"], atol=1e-5, rtol=1e-5)


@both_versions
@every_family
def test_decoder_with_cross_attention_and_cache(reference, version, family, tmp_path):
    t, config = tensors(), config_of(family, **DECODER)
    states = {"encoder_hidden_states": t["states"], "encoder_attention_mask": t["states_mask"]}
    everything = {"output_attentions": True, "output_hidden_states": True}
    calls = [
        {"input_ids": t["ids"], "use_cache": False},
        {"input_ids": t["ids"], "attention_mask": t["mask"], "use_cache": False},
        {"input_ids": t["ids"], "encoder_hidden_states": t["states"], "use_cache": False, **everything},
        {"input_ids": t["ids"], "attention_mask": t["mask"], "use_cache": False, **states, **everything},
        {"input_ids": t["ids"][:, :7], "use_cache": True, **states},
        {"input_ids": t["ids"][:, 7:8], "use_cache": True, "past_key_values": True, **states},
        {"input_ids": t["ids"][:, 8:], "use_cache": True, "past_key_values": True, **states, **everything},
    ]
    if version == OLD:
        calls.insert(4, {"input_ids": t["ids"], "attention_mask": t["seen"], "use_cache": False})
    expected = made(reference, version, tmp_path, config, calls)
    encoder = our_encoder(tmp_path, config)
    past = None
    for call, outputs in zip(calls, expected, strict=True):
        ours = {**call, "past_key_values": past} if "past_key_values" in call else call
        output = encoder(**ours)
        past = output.past_key_values
        assert_same(output, outputs)
    torch.testing.assert_close(  # in pieces as at once
        output.last_hidden_state, encoder(t["ids"], **states).last_hidden_state[:, 8:], atol=1e-5, rtol=1e-5
    )


@both_versions
def test_decoder_cache_with_padding(reference, version, tmp_path):
    """Two calls, the mask of the second covering the cached tokens."""
    t, config = tensors(), config_of("xlm-roberta", is_decoder=True)
    mask = t["mask"].flip(1)  # on the left
    positions = (mask.cumsum(1) * mask + 1).clamp(min=2)
    calls = [
        {"input_ids": t["ids"][:, :8], "attention_mask": mask[:, :8], "position_ids": positions[:, :8]},
        {"input_ids": t["ids"][:, 8:], "attention_mask": mask, "position_ids": positions[:, 8:]},
    ]
    calls[1]["past_key_values"] = True
    expected = made(reference, version, tmp_path, config, calls)
    encoder = our_encoder(tmp_path, config)
    first = encoder(**calls[0], use_cache=True)
    second = encoder(**{**calls[1], "past_key_values": first.past_key_values}, use_cache=True)
    real = mask.bool()
    for output, outputs, rows in ((first, expected[0], real[:, :8]), (second, expected[1], real[:, 8:])):
        torch.testing.assert_close(
            output.last_hidden_state[rows], outputs["last_hidden_state"][rows], atol=1e-5, rtol=1e-5
        )
        assert output.last_hidden_state.isfinite().all(), "a row that sees nothing gives no NaN"


def test_five_leaves_relative_positions_out(reference, tmp_path):
    """Why they are compared with 4.56.2 only: 5.x builds the model without them, in silence."""
    config = config_of("roberta", position_embedding_type="relative_key")
    names = reference(NEW).parameters("RobertaModel", hub_config(config, "float32"))
    assert not [name for name in names if "distance" in name]
    assert [name for name in hf_names(config, "Model") if "distance" in name]


@both_versions
@pytest.mark.parametrize("family", FAMILIES)
def test_config_comes_back_from_the_reference_without_loss(reference, version, family, tmp_path):
    """Every field away from its default, through the reference's own reading and writing."""
    config = config_of(
        family,
        **DECODER,
        hidden_act="silu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.25,
        classifier_dropout=0.5,
        initializer_range=0.03,
        pad_token_id=2,
        bos_token_id=3,
        eos_token_id=0,
        position_embedding_type="relative_key",
        use_cache=False,
        num_labels=3,
        id2label={"0": "no", "1": "yes", "2": "so so"},
        problem_type="multi_label_classification",
    )
    made(reference, version, tmp_path, config, ())
    assert read_hub_config(tmp_path / "config.json") == config
    assert read_head(tmp_path / "config.json") == "Model"
    by_them = json.loads((tmp_path / "config.json").read_text())
    by_us = hub_config(config, "float32", "Model")
    assert not by_them.keys() - by_us.keys() - {"transformers_version", "torch_dtype"}
    assert {name: value for name, value in by_them.items() if name in by_us and by_us[name] != value} == {}
