"""Folders whose languages were changed, in both versions of transformers: nothing to report, the same logits."""

import pytest
import torch

from tests.conformance.test_xmod import COMBINATIONS, LARGE, SMALL, TIED, B, batch
from tests.conformance.versions import NEW, both_versions
from xlscale import load_pretrained
from xlscale.checkpoint.hub_config import hub_config
from xlscale.config_sections import ModelConfig
from xlscale.extend import Changes, plan

FLAGS = ["none", LARGE]


def calls(languages, only):
    """One call a language, all rows in it."""
    ids, _, mask, _ = batch()
    common = {"input_ids": ids, "attention_mask": mask.long()}
    return [{**common, "lang_ids": torch.full((B,), languages.index(language))} for language in only]


@both_versions
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("theirs", ["safetensors", "shards"])
def test_a_folder_of_transformers_is_extended_and_loads_in_both(reference, version, flags, theirs, tmp_path):
    """Its own languages give the bits that they gave before; adapters/ beside the weights does not disturb."""
    config = ModelConfig(**SMALL, **COMBINATIONS[flags])
    old = ["en_XX", "sw_KE", "zh_CN"]
    save = {"max_shard_size": "12KB"} if theirs == "shards" else {}
    made = reference(version).make(
        tmp_path / "theirs", "XmodForMaskedLM", hub_config(config, "float32"), calls(config.languages, old), save=save
    )
    changes = Changes(add=["zu_ZA", "yo_NG"], init=["average:en_XX,de_DE", "yo_NG=random"], prune=["de_DE"])
    out = plan(tmp_path / "theirs", changes).write(tmp_path / "out", adapters=True)
    languages = ["en_XX", "sw_KE", "zh_CN", "zu_ZA", "yo_NG"]
    found = reference(version).load(out, "XmodForMaskedLM", calls(languages, languages))
    for before, after in zip(made.calls, found.calls, strict=False):
        assert torch.equal(before["logits"], after["logits"])
    model = load_pretrained(out)
    assert model.config.languages == languages
    for call, outputs in zip(calls(languages, languages), found.calls, strict=True):
        with torch.no_grad():
            logits = model(**call).logits
        torch.testing.assert_close(logits, outputs["logits"], atol=1e-5, rtol=1e-6)
    served = load_pretrained(out, languages=["zu_ZA"])
    served.add_adapter(out / "adapters/zh_CN.safetensors", "zh_CN")
    with torch.no_grad():
        for language in ("zh_CN", "zu_ZA"):
            (call,) = calls(served.config.languages, [language])
            whole = model(**{**call, "lang_ids": torch.full((B,), languages.index(language))}).logits
            assert torch.equal(served(**call).logits, whole)


def test_the_file_has_the_names_that_transformers_modules_have(reference, tmp_path):
    """Below output.adapter_modules.<language>., and all of them."""
    from safetensors.torch import load_file

    config = ModelConfig(**SMALL)
    names = reference(NEW).parameters("XmodForMaskedLM", hub_config(config, "float32")).keys() - TIED
    reference(NEW).make(tmp_path / "theirs", "XmodForMaskedLM", hub_config(config, "float32"), [])
    files = plan(tmp_path / "theirs", Changes()).extract(tmp_path / "files")
    found = {
        "roberta.encoder." + name.replace(".dense", f".output.adapter_modules.{file.stem}.dense")
        for file in files
        for name in load_file(file)
    }
    assert found == {name for name in names if "adapter_modules" in name}
