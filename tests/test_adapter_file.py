"""xlscale/checkpoint/adapter_file.py and trunk.py: what a file of adapters says, and how a wrong one is refused."""

import dataclasses
import hashlib
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import xlscale
from tests.hub_folders import FAMILIES, noisy
from xlscale.checkpoint.adapter_file import open_adapters, read_adapter_file
from xlscale.checkpoint.hub import hub_writer, write_alone
from xlscale.checkpoint.importers import import_folder
from xlscale.checkpoint.trunk import KNOWN, mismatch
from xlscale.extend import Changes, plan

CONFIG = dataclasses.replace(FAMILIES["xmod"], languages=["en_XX", "de_DE", "fr_XX"])


@pytest.fixture
def folder(tmp_path):
    return xlscale.save_pretrained(noisy(CONFIG), tmp_path / "hub", adapters=True)


@pytest.fixture
def file(folder):
    return folder / "adapters/fr_XX.safetensors"


def metadata(file):
    with safe_open(file, "pt") as opened:
        return dict(opened.metadata())


def told(file, name):
    return json.loads(metadata(file)[name])


def rewritten(file, change_metadata=None, change=None):
    tensors, facts = load_file(file), metadata(file)
    facts.update(change_metadata or {})
    if change:
        change(tensors)
    save_file(tensors, file, {name: value for name, value in facts.items() if value is not ...})
    return file


# What is written


@pytest.mark.parametrize("family", ["xmod", "xmod-prenorm"])
def test_the_file_holds_transformers_names_and_the_values_of_the_folder(family, tmp_path):
    config = FAMILIES[family]
    folder = xlscale.save_pretrained(noisy(config), tmp_path / "hub", adapters=True)
    assert sorted(path.name for path in (folder / "adapters").iterdir()) == ["de_DE.safetensors", "en_XX.safetensors"]
    whole = load_file(folder / "model.safetensors")
    for language in config.languages:
        found = load_file(folder / f"adapters/{language}.safetensors")
        assert len(found) == 8 and "layer.0.dense1.weight" in found
        for name, value in found.items():
            theirs = name.replace(".dense", f".output.adapter_modules.{language}.dense")
            assert torch.equal(value, whole[f"roberta.encoder.{theirs}"]), name
    facts = metadata(folder / "adapters/de_DE.safetensors")
    assert facts["format"] == "pt" and facts["writer"] == "xlscale" and facts["language"] == "de_DE"
    flags = told(folder / "adapters/de_DE.safetensors", "flags")
    for name in ("hidden_size", "num_hidden_layers", "adapter_reduction_factor", "adapter_layer_norm",
                 "adapter_reuse_layer_norm", "ln_before_adapter", "pre_norm", "hidden_act"):  # fmt: skip
        assert flags[name] == getattr(config, name)


def test_the_digest_is_what_its_docstring_says(folder, file):
    """As anyone may compute it: sha256 over name, shape and values in the order of our names."""
    model = dict(xlscale.load_pretrained(folder).named_parameters())
    digest = hashlib.sha256()
    for name in sorted(model):
        if name.startswith("encoder.") and "embeddings" not in name and ".adapters." not in name:
            digest.update(f"{name} {list(model[name].shape)}\n".encode())
            digest.update(b"".join(struct.pack("<f", value) for value in model[name].flatten().tolist()))
    assert told(file, "base")["fp32"] == digest.hexdigest()


def test_digests_survive_an_export_in_bf16_and_the_way_back(folder, file, tmp_path):
    """fp32 -> bf16 keeps the bf16 digests; values that went through bf16 are told from those that did not."""
    single, half = open_adapters(folder), open_adapters(import_folder(folder, tmp_path / "bf16", "bf16"))
    back = open_adapters(import_folder(tmp_path / "bf16", tmp_path / "back", "fp32"))
    other = open_adapters(import_folder(folder, tmp_path / "fp16", "fp16"))
    assert not mismatch("", single.trunk, half.trunk) and not mismatch("", half.trunk, back.trunk)
    assert not mismatch("", single.trunk, other.trunk)
    assert "the trunk's layers are others (sha256 in fp32" in mismatch("x", back.trunk, single.trunk)
    assert "x knows its trunk in fp16 only, which cannot be held against bf16" in mismatch("x", other.trunk, half.trunk)
    for part in ("base", "embeddings", "head"):
        assert half.trunk.digests(part) == {"bf16": told(file, part)["bf16"]}
    assert read_adapter_file(file).trunk.formats == KNOWN["fp32"]


def test_new_vocabulary_changes_the_embeddings_digest_alone(folder, file, tmp_path):
    model = noisy(dataclasses.replace(CONFIG, vocab_size=64))
    wider = xlscale.save_pretrained(model, tmp_path / "wider")
    with torch.no_grad():
        old = noisy(CONFIG)
        for name, value in model.named_parameters():
            value[: old.get_parameter(name).shape[0]] = old.get_parameter(name)
    wider = xlscale.save_pretrained(model, wider, adapters=True)
    before, after = file, wider / "adapters/fr_XX.safetensors"
    assert told(before, "base") == told(after, "base") and told(before, "digest") == told(after, "digest")
    assert told(before, "embeddings") != told(after, "embeddings") and told(before, "head") != told(after, "head")
    with pytest.raises(ValueError, match="the embeddings are others, as after new vocabulary"):
        plan(folder, Changes(merge=[after]))


def test_bare_models_have_no_head_to_differ_in(folder, tmp_path):
    bare = xlscale.save_pretrained(xlscale.load_pretrained(folder, "Model"), tmp_path / "bare", adapters=True)
    assert told(bare / "adapters/fr_XX.safetensors", "head") == {}
    made = plan(plan(bare, Changes(prune=["fr_XX"])).write(tmp_path / "two"), Changes(merge=[folder]))
    assert list(made.languages) == ["en_XX", "de_DE", "fr_XX"]


def test_adapter_files_make_a_folder_no_stranger(folder):
    """It is replaced as any folder of ours; with a file of others among them it is not."""
    again = xlscale.save_pretrained(noisy(CONFIG), folder)
    assert not (again / "adapters").exists()
    xlscale.save_pretrained(noisy(CONFIG), folder, adapters=True)
    save_file({"x": torch.ones(1)}, folder / "adapters/nl_XX.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="holds what xlscale did not write"):
        xlscale.save_pretrained(noisy(CONFIG), folder)
    with pytest.raises(ValueError, match="a model of type xlm-roberta-xl has no adapters to write"):
        xlscale.save_pretrained(noisy(FAMILIES["xl"]), folder.parent / "xl", adapters=True)


def test_tokens_seen_stand_in_the_files_and_are_kept(tmp_path):
    model = noisy(CONFIG)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    shapes = {name: tuple(value.shape) for name, value in parameters.items()}
    writer = hub_writer(
        tmp_path / "hub", CONFIG, shapes, adapters=True, tokens_seen={"en_XX": 12_000_000_000, "de_DE": 0}
    )
    folder = write_alone(writer, lambda name: (parameters[name],))
    out = plan(folder, Changes(rename=["en_XX=en_GB"], add=["sw_KE"], init=["copy:en_GB"])).write(tmp_path / "out")
    seen = {path.stem: metadata(path)["tokens_seen"] for path in (out / "adapters").iterdir()}
    assert seen == {"en_GB": "12000000000", "de_DE": "0", "fr_XX": "unknown", "sw_KE": "0"}


# What is read


def refusal(file, folder):
    """The one line with which reading, merging and serving refuse a file."""
    lines = []
    for use in (
        lambda: read_adapter_file(file),
        lambda: plan(folder, Changes(merge=[file])),
        lambda: xlscale.load_pretrained(folder, languages=["en_XX"]).add_adapter(file, "fr_XX"),
    ):
        with pytest.raises(ValueError) as caught:
            use()
        lines.append(str(caught.value))
    assert len(set(lines)) == 1 and "\n" not in lines[0] and len(lines[0]) < 600 and str(file) in lines[0]
    return lines[0]


WEIGHT = "layer.0.dense1.weight"
FLAGS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu",
         "layer_norm_eps": 1e-5, "pre_norm": False, "adapter_reduction_factor": 2, "adapter_layer_norm": False,
         "adapter_reuse_layer_norm": True, "ln_before_adapter": True}  # fmt: skip
BAD = {
    "a fact missing": ({"base": ...}, None, "is no file of adapters: its metadata lack base"),
    "facts missing": ({"flags": ..., "digest": ...}, None, "lack flags, digest; write one with xlscale extend"),
    "flags that are no table": ({"flags": "[1]"}, None, "flags in its metadata is no table of what it says"),
    "base that is not JSON": ({"base": "{"}, None, "base in its metadata is no table"),
    "base that is empty": ({"base": "{}"}, None, "base in its metadata is no table"),
    "base that is no digest": ({"base": '{"fp32": "abc"}'}, None, "base in its metadata is no table"),
    "nested too deep": ({"base": "[" * 100_000}, None, "base in its metadata is no table"),
    "parts in different formats": ({"base": json.dumps({"bf16": "0" * 64})}, None, "in different formats"),
    "a flag missing": ({"flags": '{"hidden_size": 16}'}, None, "flags are not those of adapters (num_hidden_layers"),
    "a flag unknown": ({"flags": json.dumps(FLAGS | {"colour": 1})}, None, "(colour)"),
    "a flag of another type": ({"flags": json.dumps(FLAGS | {"pre_norm": 0})}, None, "(pre_norm)"),
    "a flag that breaks a rule": (
        {"flags": json.dumps(FLAGS | {"adapter_reduction_factor": 0})}, None, "adapter_reduction_factor = 0"
    ),
    "more layers than tensors": (
        {"flags": json.dumps(FLAGS | {"num_hidden_layers": 10**9})}, None, "8 tensors, too few for 1000000000 layers"
    ),
    "another width": ({"flags": json.dumps(FLAGS | {"hidden_size": 32})}, None, "8 of another shape"),
    "a language that is none": ({"language": "../etc"}, None, '"../etc" is not a code'),
    "tokens that are no number": ({"tokens_seen": "many"}, None, "tokens_seen='many' must be a number or unknown"),
    "a tensor missing": (None, lambda t: t.pop(WEIGHT), "1 missing (layer.0.dense1.weight)"),
    "a tensor too many": (None, lambda t: t.update(x=torch.ones(1)), "1 unexpected (x)"),
    "a bit flipped": (None, lambda t: t[WEIGHT].view(torch.int32)[0, 0].bitwise_xor_(1), "is damaged: its values"),
    "not finite": (None, lambda t: t[WEIGHT].fill_(float("inf")), "layer.0.dense1.weight holds inf"),
    "of two formats": (None, lambda t: t.update({WEIGHT: t[WEIGHT].half()}), "holds F16 and F32; adapters are all of"),
    "of whole numbers": (None, lambda t: t.update({n: v.int() for n, v in t.items()}), "holds I32; adapters are"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_refused_in_one_line(case, folder, file):
    facts, change, line = BAD[case]
    assert line in refusal(rewritten(file, facts, change), folder)


def test_the_flags_of_the_cases_are_those_of_the_file(file):
    assert told(file, "flags") == FLAGS


@pytest.mark.parametrize(
    ("flag", "value"), [("num_attention_heads", 4), ("pre_norm", True), ("ln_before_adapter", False),
                        ("adapter_reuse_layer_norm", False), ("hidden_act", "relu"), ("layer_norm_eps", 1e-12)]
)  # fmt: skip
def test_other_flags_are_another_model(flag, value, folder, file):
    rewritten(file, {"flags": json.dumps(FLAGS | {flag: value})})
    with pytest.raises(ValueError, match=rf"{flag} is {value!r} there and .* here; use adapters made on this very one"):
        plan(folder, Changes(merge=[file]))


def test_damaged_and_missing_files_are_refused(folder, file):
    content = file.read_bytes()
    file.write_bytes(content[:-5])
    assert "is damaged or not safetensors" in refusal(file, folder)
    with pytest.raises(ValueError, match="is not a folder"):
        open_adapters(folder / "adapters/sw_KE.safetensors")
    with pytest.raises(ValueError, match="is no file of adapters; give one as adapters/"):
        read_adapter_file(folder / "config.json")
