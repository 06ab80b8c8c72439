"""X-MOD against transformers in both versions: all combinations of its flags, mixed languages, gradients, full size."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conformance.versions import NEW, ReferenceFailedError, both_versions
from xlscale.checkpoint.hub_config import hub_config, read_hub_config
from xlscale.checkpoint.hub_names import hf_names
from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.families import PRESETS, parameter_shapes, preset
from xlscale.models.heads import MaskedLM

SMALL = {
    "model_type": "xmod",
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "layer_norm_eps": 1e-3,
    "languages": ["en_XX", "de_DE", "sw_KE", "zh_CN"],
    "default_language": "sw_KE",
}
FLAGS = ("pre_norm", "adapter_layer_norm", "adapter_reuse_layer_norm", "ln_before_adapter")
COMBINATIONS = {
    " ".join(f for f, on in zip(FLAGS, bits, strict=True) if on) or "none": dict(zip(FLAGS, bits, strict=True))
    for bits in itertools.product((False, True), repeat=4)
}
BASE, LARGE = "adapter_reuse_layer_norm ln_before_adapter", "pre_norm adapter_layer_norm adapter_reuse_layer_norm"
TIED = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
B, T = 6, 9


def batch():
    """Languages in no order, one alone, one absent; rows of several lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 61, (B, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([9, 4, 9, 7, 1, 9])[:, None]
    labels = torch.where((torch.rand(B, T, generator=generator) < 0.4) & mask, ids, IGNORE)
    return ids.where(mask, torch.tensor(1)), labels, mask, torch.tensor([3, 0, 3, 1, 0, 3])


def loaded(folder, config):
    model = MaskedLM(read_hub_config(folder / "config.json"))
    assert model.config == config
    tensors = load_file(folder / "model.safetensors")
    with torch.no_grad():
        for ours, theirs in hf_names(config).items():
            model.get_parameter(ours).copy_(tensors.pop(theirs))
    assert tensors.keys() <= TIED
    return model.eval()


def assert_same_gradients(model, config, expected):
    names = hf_names(config)
    for name, parameter in model.named_parameters():
        theirs = expected.get(names[name])
        if ".adapters.sw_KE." in name:  # not in the batch
            assert parameter.grad is None and (theirs is None or not theirs.any()), name
        elif name.endswith("attention.key.bias"):  # softmax ignores it: its true gradient is zero
            assert parameter.grad.abs().max() <= 1e-7 and theirs.abs().max() <= 1e-7, name
        else:
            assert theirs.norm() > 0, name
            assert (parameter.grad - theirs).norm() <= 1e-5 * theirs.norm(), name


@both_versions
@pytest.mark.parametrize("flags", COMBINATIONS)
def test_logits_loss_and_gradients_of_a_batch_of_several_languages(reference, version, flags, tmp_path):
    factor = 4 if "pre_norm" in flags else 2
    config = ModelConfig(**SMALL, **COMBINATIONS[flags], adapter_reduction_factor=factor)
    ids, labels, mask, lang_ids = batch()
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "lang_ids": lang_ids, "labels": labels}
    made = reference(version).make(tmp_path, "XmodForMaskedLM", hub_config(config, "float32"), inputs, grads=True)
    model = loaded(tmp_path, config)
    logits = model.logits(ids, mask, lang_ids=lang_ids)
    assert made.tensors["logits"].std() > 0.1, "the comparison needs logits that differ"
    torch.testing.assert_close(logits, made.tensors["logits"], atol=1e-5, rtol=1e-6)
    loss = model(ids, labels, mask, lang_ids=lang_ids).losses_M.mean()
    torch.testing.assert_close(loss, made.tensors["loss"], atol=1e-5, rtol=0)
    loss.backward()
    assert_same_gradients(model, config, made.grads)


@both_versions
@pytest.mark.parametrize("flags", [BASE, LARGE, "none"])
def test_our_folder_loads_with_the_default_language_that_was_set(reference, version, flags, tmp_path):
    """Our names and config.json, without ids: both sides run the default language."""
    config = ModelConfig(**SMALL, **COMBINATIONS[flags])
    torch.manual_seed(0)
    model = MaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    model.set_default_language("zh_CN")
    tensors = {theirs: model.get_parameter(ours).detach() for ours, theirs in hf_names(config).items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(hub_config(model.config, "float32")))
    ids, _, mask, lang_ids = batch()
    calls = [{"input_ids": ids, "attention_mask": mask.long()}]
    calls += [{**calls[0], "lang_ids": lang_ids}, {**calls[0], "lang_ids": torch.full((B,), 3)}]
    found = reference(version).load(tmp_path, "XmodForMaskedLM", calls)
    for call, outputs in zip(calls, found.calls, strict=True):
        logits = model.logits(ids, mask, lang_ids=call.get("lang_ids"))
        torch.testing.assert_close(logits, outputs["logits"], atol=1e-5, rtol=1e-6)
    assert torch.equal(found.calls[0]["logits"], found.calls[2]["logits"])


@both_versions
@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("xmod")])
def test_names_and_shapes_at_full_size_are_the_references(reference, version, name):
    config = preset(name)
    found = reference(version).parameters("XmodForMaskedLM", hub_config(config, "float32"))
    names = hf_names(config)
    ours = {names[key]: shape for key, shape in parameter_shapes(config).items()}
    assert ours == {key: shape for key, shape in found.items() if key not in TIED}


def test_language_out_of_range_is_refused_by_us_and_taken_for_none_by_transformers(reference, tmp_path):
    config = ModelConfig(**SMALL)
    ids, *_ = batch()
    inputs = {"input_ids": ids, "lang_ids": torch.tensor([0, 1, 2, 3, 4, 0])}
    reference(NEW).make(tmp_path, "XmodForMaskedLM", hub_config(config, "float32"), inputs)
    with pytest.raises(ValueError, match=r"lang_ids holds 4, which has no adapter; use one of: 0 en_XX.*3 zh_CN"):
        loaded(tmp_path, config).logits(**inputs)


@both_versions
def test_freezing_works_on_the_bare_model_where_that_of_transformers_fails(reference, version, tmp_path):
    config = hub_config(ModelConfig(**SMALL), "float32", "Model")
    freeze = [["freeze_embeddings_and_language_adapters"]]
    with pytest.raises(ReferenceFailedError, match="has no attribute 'roberta'"):
        reference(version).make(tmp_path, "XmodModel", config, {"input_ids": batch()[0]}, before=freeze)
