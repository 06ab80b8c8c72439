"""Our masked LM against the one of transformers: names, values, logits, losses, gradients, both directions.

Every parameter is noisy, biases and norms too, so that a swapped or forgotten one shows.
"""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForMaskedLM

from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.hub_config import hub_config
from xlscale.checkpoint.hub_folder import read_hub_folder
from xlscale.checkpoint.hub_names import hf_names
from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.families import PRESETS, parameter_shapes, preset
from xlscale.models.heads import MaskedLM

SMALL = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 56,
    "max_position_embeddings": 30,
    "layer_norm_eps": 1e-3,  # far from every default, so that forgetting it shows
}
CASES = {
    "roberta": ModelConfig(model_type="roberta", type_vocab_size=2, **SMALL),
    "xlm-roberta": ModelConfig(model_type="xlm-roberta", **SMALL),
    "xlm-roberta-xl": ModelConfig(model_type="xlm-roberta-xl", **SMALL),
    "other-ids": ModelConfig(model_type="xlm-roberta", pad_token_id=3, bos_token_id=1, eos_token_id=0, **SMALL),
}
every_case = pytest.mark.parametrize("case", CASES)


def noise(module, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module.eval()


def ours(case):
    torch.manual_seed(0)
    return noise(MaskedLM(CASES[case]), seed=1)


def theirs(case, folder):
    """A model that transformers made by itself, and saved."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**hub_config(CASES[case], "float32"))
    model = noise(AutoModelForMaskedLM.from_config(config), seed=2)
    model.save_pretrained(folder)
    return model


def written(model, case, folder, **options):
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    return write_hub_folder(folder, CASES[case], shapes, parameters.__getitem__, **options)


def loaded_by_transformers(folder, **options):
    """The model, after a check that the loading report is empty."""
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(report.values()), report
    return model.eval()


def loaded_by_us(folder):
    config, _, read = read_hub_folder(folder)
    model = MaskedLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read(name))
    return model


def batch(case, padded):
    """ids, labels, attention mask [4, 17]; rows of different lengths if padded."""
    config, generator = CASES[case], torch.Generator().manual_seed(3)
    ids = torch.randint(5, config.vocab_size, (4, 17), generator=generator)
    lengths = torch.tensor([17, 12, 5, 1] if padded else [17] * 4)
    mask = torch.arange(17) < lengths[:, None]
    labels = torch.where((torch.rand(4, 17, generator=generator) < 0.3) & mask, ids, IGNORE)
    assert (labels != IGNORE).any()
    return ids.where(mask, torch.tensor(config.pad_token_id)), labels, mask


def assert_same_logits_and_loss(our_model, their_model, case):
    for padded in (False, True):
        ids, labels, mask = batch(case, padded)
        with torch.no_grad():
            reference = their_model(ids, attention_mask=mask.long(), labels=labels)
            logits = our_model.logits(ids, mask if padded else None)
            loss = our_model(ids, labels, mask if padded else None).losses_M.mean()
        assert reference.logits.std() > 0.1, "the comparison needs logits that differ"
        torch.testing.assert_close(logits, reference.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(loss, reference.loss, atol=1e-5, rtol=0)


@every_case
def test_our_folder_gives_transformers_the_same_logits_and_loss(case, tmp_path):
    model = ours(case)
    assert_same_logits_and_loss(model, loaded_by_transformers(written(model, case, tmp_path / "hub")), case)


@every_case
def test_folder_of_transformers_gives_us_the_same_logits_and_loss(case, tmp_path):
    reference = theirs(case, tmp_path)
    assert_same_logits_and_loss(loaded_by_us(tmp_path), reference, case)


@every_case
def test_config_comes_back_from_transformers_as_it_was(case, tmp_path):
    theirs(case, tmp_path)
    assert read_hub_folder(tmp_path)[0] == CASES[case]


@every_case
@pytest.mark.parametrize("padding", ["none", "hidden", "seen"])
def test_gradients_of_one_backward_agree_on_every_parameter(case, padding, tmp_path):
    """`seen`: padding that is attended to, so that what the padding rows of both embeddings get matters."""
    reference = theirs(case, tmp_path)
    model = loaded_by_us(tmp_path)
    ids, labels, mask = batch(case, padded=padding != "none")
    seen = mask | (padding == "seen")
    reference(ids, attention_mask=seen.long(), labels=labels).loss.backward()
    model(ids, labels, mask if padding == "hidden" else None).losses_M.mean().backward()
    names = hf_names(CASES[case])
    for name, parameter in model.named_parameters():
        gradient, expected = parameter.grad, reference.get_parameter(names[name]).grad
        if name.endswith("attention.key.bias"):  # softmax ignores it: its true gradient is zero
            assert gradient.abs().max() <= 1e-7 and expected.abs().max() <= 1e-7, name
            continue
        assert expected.norm() > 0, name
        assert (gradient - expected).norm() <= 1e-5 * expected.norm(), name


def test_sharded_folder_gives_the_same_logits(tmp_path):
    model = ours("xlm-roberta-xl")
    folder = written(model, "xlm-roberta-xl", tmp_path / "hub", max_shard_size=20_000)
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert max((folder / name).stat().st_size for name in files) < 20_000 + 4_000  # 4 kB for the header
    assert_same_logits_and_loss(model, loaded_by_transformers(folder), "xlm-roberta-xl")
    assert_same_logits_and_loss(loaded_by_us(folder), loaded_by_transformers(folder), "xlm-roberta-xl")


def test_bf16_folder_gives_the_same_values_on_both_sides(tmp_path):
    model = ours("xlm-roberta").bfloat16()
    folder = written(model, "xlm-roberta", tmp_path / "hub", dtype="bf16")
    reference = loaded_by_transformers(folder)
    assert reference.dtype == torch.bfloat16, "transformers takes the dtype from our config"
    names = hf_names(CASES["xlm-roberta"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, reference.get_parameter(names[name])), name
    assert_same_logits_and_loss(loaded_by_us(folder), reference.float(), "xlm-roberta")


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "xlm-roberta-xl"])
def test_config_json_has_every_field_that_transformers_writes(family, tmp_path):
    theirs(family, tmp_path)
    by_them = json.loads((tmp_path / "config.json").read_text())
    ours_now = hub_config(CASES[family], "float32")
    missing = by_them.keys() - ours_now.keys() - {"transformers_version"}
    assert not missing
    different = {name for name in ours_now if ours_now[name] != by_them.get(name)}
    # What they leave out because it is their default, in both versions or in one.
    assert different <= {"position_embedding_type", "tokenizer_class", "id2label", "label2id"}


@pytest.mark.parametrize("name", PRESETS)
def test_names_and_shapes_at_full_size_go_round(name):
    """On the meta device: our names on the Hub are exactly the tensors of transformers' model, and back."""
    config = preset(name)
    with torch.device("meta"):
        reference = AutoModelForMaskedLM.from_config(AutoConfig.for_model(**hub_config(config, "float32")))
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    expected = {key: tuple(value.shape) for key, value in reference.state_dict().items() if key not in tied}
    names, shapes = hf_names(config), parameter_shapes(config)
    assert {names[key]: shape for key, shape in shapes.items()} == expected
    back = {theirs: ours for ours, theirs in names.items()}
    assert len(back) == len(names) == {"xlm-roberta-xl": 586, "xlm-roberta-xxl": 778}.get(name, len(names))
    assert {back[key]: shape for key, shape in expected.items()} == shapes
