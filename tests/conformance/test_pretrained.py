"""Files as the two versions of transformers write them: pickles, shards and halves come in, and go out for both."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.versions import NEW, OLD, both_versions
from tests.hub_folders import FAMILIES
from xlscale.checkpoint.hub_config import CLASSES, hub_config
from xlscale.checkpoint.hub_names import hf_names
from xlscale.checkpoint.importers import import_folder
from xlscale.checkpoint.pretrained import load_pretrained

GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(4, 60, (3, 9), generator=GENERATOR)
INPUTS = {"input_ids": IDS}
SAVES = {
    "bin": (OLD, {"safe_serialization": False}),
    "sharded bin": (OLD, {"safe_serialization": False, "max_shard_size": "12KB"}),
    "sharded old": (OLD, {"max_shard_size": "12KB"}),
    "sharded new": (NEW, {"max_shard_size": "12KB"}),
}


def class_of(family, head="ForMaskedLM"):
    return CLASSES[FAMILIES[family].model_type] + head


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", SAVES)
def test_what_transformers_saved_comes_in_and_goes_to_both_versions(reference, case, family, tmp_path):
    version, save = SAVES[case]
    fields = hub_config(FAMILIES[family], "float32")
    made = reference(version).make(tmp_path / "theirs", class_of(family), fields, INPUTS, save=save)
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert ("pytorch_model.bin" in files) == (case == "bin") and ("sharded" in case) == any("-of-" in f for f in files)
    expected = made.tensors["logits"]
    with torch.no_grad():
        torch.testing.assert_close(load_pretrained(tmp_path / "theirs")(IDS).logits, expected, atol=1e-5, rtol=0)
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    for each in (OLD, NEW):
        found = reference(each).load(imported, class_of(family), INPUTS)
        torch.testing.assert_close(found.tensors["logits"], expected, atol=1e-5, rtol=0)


@both_versions
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_keep_their_bits_and_their_dtype(reference, version, dtype, tmp_path):
    config = FAMILIES["xmod-prenorm"]
    kind = class_of("xmod-prenorm", "ForTokenClassification")
    reference(version).make(tmp_path / "theirs", kind, hub_config(config, dtype, "ForTokenClassification"), dtype=dtype)
    imported = import_folder(tmp_path / "theirs", tmp_path / "ours")
    theirs, ours = (load_file(folder / "model.safetensors") for folder in (tmp_path / "theirs", imported))
    assert theirs.keys() == ours.keys() == set(hf_names(config, "ForTokenClassification").values())
    for name, tensor in theirs.items():
        assert str(tensor.dtype) == f"torch.{dtype}" and torch.equal(tensor, ours[name]), name
    assert load_pretrained(imported).config == config
    options = {"dtype": "auto"}
    assert reference(version).load(imported, kind, INPUTS, options=options).info["dtype"] == f"torch.{dtype}"


@both_versions
def test_another_head_starts_as_transformers_starts_it(reference, version, tmp_path):
    """The encoder's states are the same; the new classifier is drawn, by each side for itself."""
    config = dataclasses.replace(FAMILIES["roberta"], num_labels=2)
    reference(version).make(tmp_path, class_of("roberta"), hub_config(config, "float32"))
    inputs = {**INPUTS, "output_hidden_states": True}
    found = reference(version).load(tmp_path, class_of("roberta", "ForSequenceClassification"), inputs, clean=False)
    model = load_pretrained(tmp_path, "ForSequenceClassification")
    with torch.no_grad():
        last = model(IDS, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(last, found.tensors["hidden_states.2"], atol=1e-5, rtol=0)
