"""Every head of every family against both versions of transformers: logits, losses, gradients, both directions.

Every parameter is noisy, biases and norms too, so that a swapped or forgotten one shows.
"""

from collections.abc import Callable

import pytest
import torch

from tests.conformance.versions import Reference, both_versions
from xlscale.checkpoint.hub_config import CLASSES, hub_config
from xlscale.checkpoint.hub_names import hf_names
from xlscale.checkpoint.pretrained import load_pretrained, save_pretrained
from xlscale.config_sections import ModelConfig
from xlscale.data.masking import IGNORE
from xlscale.models.bare import Model
from xlscale.models.heads import HEADS
from xlscale.models.init import init_weights

References = Callable[[str], Reference]
SMALL = {
    "vocab_size": 83,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 40,
    "layer_norm_eps": 1e-3,  # far from every default, so that forgetting it shows
}
LANGUAGES = ["en_XX", "de_DE", "sw_KE", "ta_IN"]
XMOD = {"model_type": "xmod", "languages": LANGUAGES, "default_language": "de_DE"}
FAMILIES = {
    "roberta": {"model_type": "roberta", "type_vocab_size": 2},
    "xlm-roberta": {"model_type": "xlm-roberta"},
    "xl": {"model_type": "xlm-roberta-xl"},
    "xmod": XMOD,
    "xmod-pre": {**XMOD, "pre_norm": True, "adapter_layer_norm": True, "adapter_reduction_factor": 4},
}
# case -> (head, fields of the config)
SEQUENCE, DECODER = "ForSequenceClassification", {"is_decoder": True}
CASES: dict[str, tuple[str, dict]] = {
    "bare": ("Model", {}),
    "bare decoder": ("Model", DECODER),
    "masked": ("ForMaskedLM", {}),
    "causal": ("ForCausalLM", DECODER),
    "causal both ways": ("ForCausalLM", {}),
    "cross": ("ForCausalLM", {**DECODER, "add_cross_attention": True}),
    "regression": (SEQUENCE, {"num_labels": 3, "problem_type": "regression"}),
    "regression of one": (SEQUENCE, {"num_labels": 1}),
    "single-label": (SEQUENCE, {"num_labels": 3, "classifier_dropout": 0.3}),
    "multi-label": (SEQUENCE, {"num_labels": 3, "problem_type": "multi_label_classification"}),
    "choice": ("ForMultipleChoice", {}),
    "token": ("ForTokenClassification", {"num_labels": 5}),
    "question": ("ForQuestionAnswering", {}),
}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_case = pytest.mark.parametrize("case", CASES)
TIED = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
NOISE = 0.2


def config_of(family, case):
    return ModelConfig(**{**SMALL, **FAMILIES[family], **CASES[case][1]})


def class_of(family, case):
    return CLASSES[FAMILIES[family]["model_type"]] + CASES[case][0]


def calls_of(family, case):
    """Arguments of one call without padding, and of one with: four samples, or three of four choices each."""
    config, generator = config_of(family, case), torch.Generator().manual_seed(3)
    shape = (3, 4, 11) if case == "choice" else (4, 11)
    ids = torch.randint(5, config.vocab_size, shape, generator=generator)
    lengths = torch.tensor([11, 8, 3, 1]).expand(shape[:-1])
    mask = torch.arange(11) < lengths[..., None]
    call = labels_of(case, config, ids, generator)
    if config.languages and case != "choice":  # transformers fails there
        call["lang_ids"] = torch.tensor([0, 2, 0, 2])
    if config.type_vocab_size > 1:
        call["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    if config.add_cross_attention:
        call["encoder_hidden_states"] = torch.randn(4, 6, config.hidden_size, generator=generator)
        call["encoder_attention_mask"] = (torch.arange(6) < torch.tensor([6, 4, 2, 6])[:, None]).long()
    padded = {"input_ids": ids.where(mask, torch.tensor(config.pad_token_id)), "attention_mask": mask.long()}
    return [{"input_ids": ids, **call}, {**padded, **call}]


def labels_of(case, config, ids, generator):
    head = CASES[case][0]
    if head == "Model":
        return {}
    if head in ("ForMaskedLM", "ForCausalLM"):
        return {"labels": ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.5, IGNORE)}
    if head == "ForTokenClassification":  # labels on padding too: one family leaves them out
        labels = torch.randint(0, config.num_labels, ids.shape, generator=generator)
        return {"labels": labels.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, IGNORE)}
    if head == "ForQuestionAnswering":
        return {"start_positions": torch.tensor([0, 7, 11, 300]), "end_positions": torch.tensor([10, 99, 2, 0])}
    if head == "ForMultipleChoice":
        return {"labels": torch.tensor([3, 0, 1])}
    if config.problem_type == "" and config.num_labels > 1:
        return {"labels": torch.tensor([2, 0, 0, 1])}
    if config.problem_type == "multi_label_classification":
        return {"labels": torch.randint(0, 2, (4, config.num_labels), generator=generator).float()}
    return {"labels": torch.randn(4, config.num_labels, generator=generator)}


def ours(config, head):
    model = HEADS[head](config)
    init_weights(model, config, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * NOISE)
    return model.eval()


def flat(name, value):
    """Every tensor of an output under a dotted name, as the reference gives them: "logits", "hidden_states.0"."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    parts = {f"{name}.{index}": part for index, part in enumerate(value or ())}
    return {key: tensor for part, inner in parts.items() for key, tensor in flat(part, inner).items()}


def assert_same(output, expected):
    """All fields that both have, by the same names."""
    found = {key: tensor for name, value in output._asdict().items() for key, tensor in flat(name, value).items()}
    if "past_key_values.0.0" not in expected:  # nor has the harness those of 4.56 without cross-attention
        found = {name: value for name, value in found.items() if not name.startswith("past_key_values")}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert name == "loss" or expected[name].std() > 0.02, f"the comparison needs {name} that differ"
        message = lambda text, name=name: f"{name}: {text}"  # noqa: E731
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0, msg=message)


@both_versions
@every_family
@every_case
def test_reference_to_us_same_outputs_and_gradients(reference: References, version, family, case, tmp_path):
    head, config, calls = CASES[case][0], config_of(family, case), calls_of(family, case)
    fields = hub_config(config, "float32", head)
    grads = head != "Model"
    made = reference(version).make(tmp_path, class_of(family, case), fields, calls, grads=grads, noise=NOISE)
    model = load_pretrained(tmp_path)
    assert type(model) is HEADS[head]
    assert model.config == config
    for call, expected in zip(calls, made.calls, strict=True):
        output = model(**call)
        assert_same(output, expected)
    if grads:
        output.loss.backward()
        assert_same_gradients(model, made.grads)


def assert_same_gradients(model, reference):
    names = hf_names(model.config, model.architecture)
    unknown = reference.keys() - {names[name] for name, _ in model.named_parameters()} - TIED
    assert not unknown
    for name, parameter in model.named_parameters():
        # None is an adapter that no sample of the batch has; 5.x runs it on nothing and has zeros.
        expected = reference.get(names[name], torch.zeros(()))
        found = torch.zeros(()) if parameter.grad is None else parameter.grad
        if has_no_gradient(name, model):
            assert found.abs().max() <= 1e-7 and expected.abs().max() <= 1e-7, name
        else:
            assert expected.norm() > 1e-6, name
            assert (found - expected).norm() <= 1e-5 * expected.norm(), name


def has_no_gradient(name, model):
    """Whether the true gradient is zero: no sample comes by, or softmax ignores what is the same for all it sees."""
    head, config = model.architecture, model.config
    if ".adapters." in name:
        called = ["de_DE"] if head == "ForMultipleChoice" else [LANGUAGES[0], LANGUAGES[2]]
        return not any(f".{language}." in name for language in called)
    same_for_all = ["attention.key.bias"]  # keys
    if head == "ForQuestionAnswering":  # tokens
        last = f"layers.{config.num_hidden_layers - 1}.mlp_norm.bias"
        final_norm = model.encoder.final_norm is not None
        same_for_all += ["qa_outputs.bias", "final_norm.bias"] + ([] if final_norm or config.languages else [last])
    if head == "ForMultipleChoice":  # choices
        same_for_all += ["classifier.bias"]
    return name.endswith(tuple(same_for_all))


@both_versions
@every_family
@every_case
def test_us_to_reference_nothing_to_report_and_same_outputs(reference: References, version, family, case, tmp_path):
    head, config, calls = CASES[case][0], config_of(family, case), calls_of(family, case)
    model = ours(config, head)
    folder = save_pretrained(model, tmp_path / "hub")
    found = reference(version).load(folder, class_of(family, case), calls)
    for call, expected in zip(calls, found.calls, strict=True):
        with torch.no_grad():
            assert_same(model(**call), expected)


@both_versions
@every_family
@pytest.mark.parametrize("case", ["bare", "masked", "cross", "single-label", "choice", "token", "question"])
def test_states_weights_and_cache_have_the_references_names(reference: References, version, family, case, tmp_path):
    config, call = config_of(family, case), calls_of(family, case)[0]
    asked = {"output_hidden_states": True, "output_attentions": True}
    call = {name: value for name, value in call.items() if name != "labels" and "positions" not in name} | asked
    model = ours(config, CASES[case][0])
    folder = save_pretrained(model, tmp_path / "hub")
    options = {"attn_implementation": "eager"}
    found = reference(version).load(folder, class_of(family, case), call, options=options).tensors
    assert {name.partition(".")[0] for name in found} >= {"hidden_states", "attentions"}
    assert not config.add_cross_attention or ("cross_attentions.1" in found and "past_key_values.1.3" in found)
    with torch.no_grad():
        assert_same(model(**call), found)


@both_versions
@pytest.mark.parametrize("family", ["xmod", "xmod-pre"])
def test_choices_of_mixed_languages_equal_the_reference_language_by_language(
    reference: References, version, family, tmp_path
):
    """transformers fails with lang_ids here, so it gets each sample with its language as the default."""
    model = ours(config_of(family, "choice"), "ForMultipleChoice")
    folder = save_pretrained(model, tmp_path / "hub")
    ids = calls_of(family, "choice")[0]["input_ids"]
    lang_ids = torch.tensor([3, 0, 2])
    with torch.no_grad():
        logits = model(ids, lang_ids=lang_ids).logits
    for row, language in enumerate(lang_ids.tolist()):
        before = [["set_default_language", LANGUAGES[language]]]
        found = reference(version).load(
            folder, "XmodForMultipleChoice", {"input_ids": ids[row : row + 1]}, before=before
        )
        torch.testing.assert_close(logits[row], found.tensors["logits"][0], atol=1e-5, rtol=0)


@both_versions
@pytest.mark.parametrize("case", ["bare", "single-label", "token"])
def test_sharded_bf16_folder_with_mixed_languages(reference: References, version, case, tmp_path):
    config, call = config_of("xmod-pre", case), calls_of("xmod-pre", case)[1]
    model = ours(config, CASES[case][0]).bfloat16()
    folder = save_pretrained(model, tmp_path / "hub", max_shard_size="9KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    options = {"dtype": "float32"}
    found = reference(version).load(folder, class_of("xmod-pre", case), call, options=options)
    back = load_pretrained(folder)
    assert next(back.parameters()).dtype == torch.bfloat16
    with torch.no_grad():
        assert_same(back.float()(**call), found.tensors)


@both_versions
@pytest.mark.parametrize("family", ["roberta", "xl"])
def test_bare_model_without_pooler_loads_into_any_head(reference: References, version, family, tmp_path):
    """As folders of encoders without a pooler do: only the head and the pooler are missing."""
    model = Model(config_of(family, "bare"), pooler=False)
    folder = save_pretrained(model, tmp_path / "hub")
    for head, missing in (("Model", {"pooler"}), ("ForTokenClassification", {"classifier"})):
        report = reference(version).load(folder, class_of(family, "bare").replace("Model", head), clean=False).report
        assert {name.partition(".")[0] for name in report.pop("missing_keys")} == missing
        assert not any(report.values())
