"""Folders of ours in transformers 4.56.2 and 5.23.0: nothing missing, nothing unexpected, the same numbers."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conformance.test_masked_lm import CASES, batch, loaded_by_us, ours, written
from tests.conformance.versions import Reference, ReferenceFailedError, both_versions
from xlscale.checkpoint.hub_config import hub_config
from xlscale.checkpoint.hub_folder import read_hub_folder
from xlscale.checkpoint.hub_names import hf_names
from xlscale.checkpoint.pretrained import save_pretrained
from xlscale.models.families import PRESETS, parameter_shapes, preset
from xlscale.models.heads import ForMaskedLM

References = Callable[[str], Reference]
MASKED_LM = {"roberta": "RobertaForMaskedLM", "xlm-roberta": "XLMRobertaForMaskedLM",
             "xlm-roberta-xl": "XLMRobertaXLForMaskedLM", "other-ids": "XLMRobertaForMaskedLM"}  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES)


def inputs_of(case, padded):
    ids, labels, mask = batch(case, padded)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}, mask if padded else None


def assert_same(model, found, case, padded):
    """Logits and loss of our model against the outputs of the reference."""
    inputs, mask = inputs_of(case, padded)
    assert found["logits"].std() > 0.1, "the comparison needs logits that differ"
    with torch.no_grad():
        logits = model.logits(inputs["input_ids"], mask)
        loss = model(inputs["input_ids"], inputs["labels"], mask).losses_M.mean()
    torch.testing.assert_close(logits, found["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(loss, found["loss"], atol=1e-5, rtol=0)


@both_versions
@every_case
@pytest.mark.parametrize("kind", ["by name", "automatic"])
def test_our_folder_loads_with_nothing_to_report_and_the_same_logits(
    reference: References, version, case, kind, tmp_path
):
    model = ours(case)
    folder = written(model, case, tmp_path / "hub")
    kind = MASKED_LM[case] if kind == "by name" else "AutoModelForMaskedLM"
    found = reference(version).load(folder, kind, [inputs_of(case, padded)[0] for padded in (False, True)])
    assert found.info["class"] == MASKED_LM[case]
    for padded, outputs in zip((False, True), found.calls, strict=True):
        assert_same(model, outputs, case, padded)


@both_versions
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sharded_and_rounded_folders_load_with_nothing_to_report(reference: References, version, dtype, tmp_path):
    case = "xlm-roberta-xl"
    model = ours(case)
    folder = written(model, case, tmp_path / "hub", dtype=dtype, max_shard_size=20_000)
    assert len(list(folder.glob("*.safetensors"))) > 2
    # 4.56 takes float32 unless it is told otherwise, 5.x what the config says.
    options = {"dtype": "auto"}
    assert reference(version).load(folder, MASKED_LM[case], options=options).info["dtype"] == (
        "torch.bfloat16" if dtype == "bf16" else "torch.float32"
    )
    found = reference(version).load(folder, MASKED_LM[case], inputs_of(case, True)[0], options={"dtype": "float32"})
    assert_same(loaded_by_us(folder).float(), found.tensors, case, True)


@both_versions
@every_case
def test_folder_of_the_reference_gives_us_the_same_logits_loss_and_gradients(
    reference: References, version, case, tmp_path
):
    inputs, _ = inputs_of(case, False)
    made = reference(version).make(tmp_path, MASKED_LM[case], hub_config(CASES[case], "float32"), inputs, grads=True)
    assert read_hub_folder(tmp_path)[0] == CASES[case]
    model = loaded_by_us(tmp_path)
    assert_same(model, made.tensors, case, False)
    model(inputs["input_ids"], inputs["labels"], None).losses_M.mean().backward()
    names = hf_names(CASES[case])
    assert made.grads.keys() - set(names.values()) <= {"lm_head.decoder.weight", "lm_head.decoder.bias"}, "all are seen"
    for name, parameter in model.named_parameters():
        expected = made.grads[names[name]]
        if name.endswith("attention.key.bias"):  # softmax ignores it: its true gradient is zero
            assert parameter.grad.abs().max() <= 1e-7 and expected.abs().max() <= 1e-7, name
            continue
        assert expected.norm() > 0, name
        assert (parameter.grad - expected).norm() <= 1e-5 * expected.norm(), name


@both_versions
@pytest.mark.parametrize("name", [name for name in PRESETS if preset(name).model_type in CASES])
def test_names_and_shapes_at_full_size_are_the_references(reference: References, version, name):
    config = preset(name)
    found = reference(version).parameters(MASKED_LM[config.model_type], hub_config(config, "float32"))
    tied = {"lm_head.decoder.weight", "lm_head.decoder.bias"}
    names = hf_names(config)
    ours_now = {names[key]: shape for key, shape in parameter_shapes(config).items()}
    assert ours_now == {key: shape for key, shape in found.items() if key not in tied}


@both_versions
def test_the_loading_report_shows_what_is_missing(reference: References, version, tmp_path):
    """The comparison can fail: a tensor taken away, another put in."""
    folder = written(ours("roberta"), "roberta", tmp_path / "hub")
    tensors = load_file(folder / "model.safetensors")
    tensors["stranger.weight"] = tensors.pop("lm_head.dense.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AssertionError, match=r"lm_head\.dense\.weight.*|stranger\.weight"):
        reference(version).load(folder, "RobertaForMaskedLM")
    with pytest.raises(ReferenceFailedError, match=r"has no attribute '?NoSuchModel"):
        reference(version).load(folder, "NoSuchModel")


def test_python_without_the_second_environment_skips_with_the_way_out(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("XLSCALE_VENV_456", str(tmp_path / "nowhere"))
    with pytest.raises(pytest.skip.Exception, match=r"nowhere does not exist; `make test` makes it"):
        Reference("4.56.2").ask("versions")


@both_versions
def test_vocabulary_with_padding_rows_beyond_the_tokenizer_is_written_whole(
    reference: References, version, tiny_tokenizer, tmp_path
):
    """As XL's: 250,002 ids and 250,880 rows. Every row is written, none is an id of the tokenizer."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = ForMaskedLM(preset("xlm-roberta-xl", vocab_size=512, **small)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    folder = save_pretrained(model, tmp_path / "hub", tiny_tokenizer)
    assert tiny_tokenizer.vocab_size < 512
    text = "Все люди рождаются свободными"
    ids = torch.tensor([[0, *tiny_tokenizer.encode(text), 2]])
    assert reference(version).encode(folder, [text])[0] == ids[0].tolist()
    logits = reference(version).load(folder, "XLMRobertaXLForMaskedLM", {"input_ids": ids}).tensors["logits"]
    assert logits.shape[-1] == 512
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-5, rtol=0)
