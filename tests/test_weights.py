"""Foreign files: torch's pickles, indices, safetensors and configs, whole and hostile; one clear line for each."""

import json
import pickle
import re
import shutil
from argparse import Namespace
from collections import defaultdict

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import xlscale
from tests.hub_folders import FAMILIES, Bomb, as_bin, assert_same, noisy, refused
from xlscale.checkpoint.hub_folder import open_hub_folder
from xlscale.checkpoint.importers import import_folder
from xlscale.cli import app


@pytest.fixture
def folder(tmp_path):
    return xlscale.save_pretrained(noisy(FAMILIES["xl"]), tmp_path / "hub")


# torch's pickles


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
@pytest.mark.parametrize("files", [1, 3])
def test_pickles_are_read_as_safetensors_are(folder, files, options):
    wanted = xlscale.load_pretrained(folder)
    assert_same(xlscale.load_pretrained(as_bin(folder, files, **options)), wanted)


def test_views_and_parameters_in_a_pickle_are_read(folder):
    """Old checkpoints hold tied tensors twice, parameters, and slices of larger tensors."""
    wanted = xlscale.load_pretrained(folder)
    tensors = torch.load(as_bin(folder) / "pytorch_model.bin", weights_only=True)
    word = tensors["roberta.embeddings.word_embeddings.weight"]
    tensors["lm_head.decoder.weight"] = torch.nn.Parameter(word)
    tensors["roberta.embeddings.position_ids"] = torch.arange(12)[None]
    dense = tensors["lm_head.dense.weight"]
    tensors["lm_head.dense.weight"] = torch.cat([dense, dense], 1)[:, :16]  # not contiguous
    torch.save(tensors, folder / "pytorch_model.bin")
    assert_same(xlscale.load_pretrained(folder), wanted)


def test_file_is_mapped_anew_so_that_its_pages_do_not_pile_up(folder, monkeypatch):
    monkeypatch.setattr("xlscale.checkpoint.weights.MAPPED", 3000)
    wanted = noisy(FAMILIES["xl"])
    assert_same(xlscale.load_pretrained(folder), wanted)
    opened = open_hub_folder(as_bin(folder))
    (file,) = opened.weights.files
    first = file._tensors
    assert_same(xlscale.load_pretrained(folder), wanted)
    for name in opened.shapes:
        opened.read(name)
    assert file._tensors is not first


@pytest.mark.parametrize("how", ["bare", "torch", "legacy", "beside tensors", "in fairseq"])
def test_pickle_that_runs_code_is_refused_and_not_run(how, folder, tmp_path):
    mark, file = tmp_path / "it ran", folder / "pytorch_model.bin"
    tensors = torch.load(as_bin(folder) / file.name, weights_only=True)
    bomb = Bomb(f"'{mark}'")
    if how == "bare":
        file.write_bytes(pickle.dumps(bomb))
    elif how == "in fairseq":
        file.unlink()
        torch.save({"model": tensors, "args": Namespace(arch=bomb)}, folder / "model.pt")
    else:
        content = {**tensors, "x": bomb} if how == "beside tensors" else bomb
        torch.save(content, file, _use_new_zipfile_serialization=how != "legacy")
    line = refused(folder)
    assert "may run code; it was not run" in line and "weights_only" not in line
    assert how == "bare" or re.search(r"a pickle that asks for (posix|os|nt)\.system", line)
    assert not mark.exists()


def test_pickle_that_asks_for_more_is_read_only_when_that_is_said(folder, tmp_path, caplog):
    """A mapping of the standard library's is enough for torch to refuse it; this one also runs code."""
    file, mark, out = as_bin(folder) / "pytorch_model.bin", tmp_path / "it ran", tmp_path / "out"
    wanted = xlscale.load_pretrained(folder)
    torch.save({**torch.load(file, weights_only=True), "x": Bomb(f"'{mark}'")}, tmp_path / "bomb.bin")
    torch.save(defaultdict(list, torch.load(file, weights_only=True)), file)
    line = refused(folder)
    assert "asks for collections.defaultdict" in line and "import it with --unsafe-pickle" in line
    done = CliRunner().invoke(app, ["import", str(folder), "--out", str(out), "--unsafe-pickle"])
    assert done.exit_code == 0, done.output
    assert f"{file} asks for collections.defaultdict: unpickled without limits" in caplog.text
    assert_same(xlscale.load_pretrained(out), wanted)
    shutil.copy(tmp_path / "bomb.bin", file)  # it runs, and is still no model
    with pytest.raises(ValueError, match="'x' is not a plain tensor"):
        open_hub_folder(folder, unsafe=True)
    assert mark.exists()


def test_a_file_that_no_limit_keeps_back_is_not_run_for_a_flag_it_does_not_need(folder, tmp_path, caplog):
    import_folder(as_bin(folder), tmp_path / "out", unsafe=True)
    assert "unpickled without limits" not in caplog.text


def bad_bins(folder):
    """name -> (change of the pickle, words of the line)"""
    tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
    bias = "lm_head.bias"

    def without(name):
        return {key: value for key, value in tensors.items() if key != name}

    return {
        "missing": (without(bias), r"1 missing \(head.decoder.bias\)"),
        "wrong shape": ({**tensors, bias: torch.zeros(2, 30)}, r"head.decoder.bias \(2, 30\) for \(60,\)"),
        "no dimension": ({**tensors, bias: torch.tensor(1.0)}, "1 of another shape"),
        "stranger": ({**tensors, "lm_head.gate": torch.zeros(3)}, r"1 unexpected \(lm_head.gate\)"),
        "nan": ({**tensors, bias: torch.full((60,), float("nan"))}, "head.decoder.bias holds nan"),
        "infinite": ({**tensors, bias: torch.full((60,), float("-inf"))}, "head.decoder.bias holds -inf"),
        "integers": ({**tensors, bias: torch.zeros(60, dtype=torch.int64)}, "lm_head.bias has dtype torch.int64"),
        "double": ({**tensors, bias: torch.zeros(60).double()}, "lm_head.bias has dtype torch.float64"),
        "sparse": ({**tensors, bias: torch.zeros(60).to_sparse()}, "'lm_head.bias' is not a plain tensor"),
        "meta": ({**tensors, bias: torch.zeros(60, device="meta")}, "'lm_head.bias' is not a plain tensor"),
        "no tensor": ({**tensors, bias: [0.0] * 60}, "'lm_head.bias' is not a plain tensor"),
        "a list": (list(tensors.values()), "holds no named tensors"),
        "empty": ({}, "holds no named tensors"),
        "numbered": (dict(enumerate(tensors.values())), "'0' is not a plain tensor"),
        "both names": (
            {**tensors, "embeddings.word_embeddings.weight": torch.zeros(60, 16)},
            "holds both embeddings.word_embeddings.weight and roberta",
        ),
        "untied": ({**tensors, "lm_head.decoder.weight": torch.zeros(60, 16)}, "only tied weights can be read"),
        "untied integers": (
            {**tensors, "lm_head.decoder.weight": torch.zeros(60, 16, dtype=torch.int8)},
            "lm_head.decoder.weight has dtype torch.int8",
        ),
    }


def test_bad_tensors_of_a_pickle_are_refused_by_name(folder):
    file = as_bin(folder) / "pytorch_model.bin"
    for case, (content, words) in bad_bins(folder).items():
        torch.save(content, file)
        line = refused(folder)
        assert re.search(words, line), (case, line)


def test_pickles_that_are_cut_or_noise_are_refused(folder):
    file = as_bin(folder) / "pytorch_model.bin"
    whole = file.read_bytes()
    noise = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy()
    for content in (b"", b"\x80", whole[: len(whole) // 2], whole[100:], bytes(noise), b"\x80\x02}q\x00.", b"(" * 5000):
        file.write_bytes(content)
        assert str(file) in refused(folder)


def test_pickle_index_may_not_lead_out_of_the_folder(folder, tmp_path):
    index = as_bin(folder, 3) / "pytorch_model.bin.index.json"
    whole = json.loads(index.read_text())
    second = folder / "pytorch_model-00002-of-00003.bin"
    elsewhere = second.rename(tmp_path / second.name)
    for name in (f"../{second.name}", str(elsewhere), "..", ".", "", "a\0b", 7, None, ["x"], {"a": 1}):
        weight_map = {k: name if v == second.name else v for k, v in whole["weight_map"].items()}
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert re.search("names .* not in the folder|is not an index", refused(folder)), name
    for content in ("[]", "{", "{}", '{"weight_map": {}}', '{"weight_map": []}', "[" * 100_000, "\udcff"):
        index.write_bytes(content.encode(errors="surrogateescape"))
        assert re.search("not in the folder|is not an index", refused(folder)), content[:20]


def test_one_tensor_in_two_files_is_refused(tmp_path):
    folder = xlscale.save_pretrained(noisy(FAMILIES["xl"]), tmp_path / "hub", max_shard_size="10KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    save_file(load_file(first) | {"lm_head.bias": torch.zeros(60)}, first, {"format": "pt"})
    save_file(load_file(second) | {"lm_head.bias": torch.zeros(60)}, second, {"format": "pt"})
    assert "both hold lm_head.bias" in refused(folder)


def test_safetensors_cut_or_with_a_lying_header_are_refused(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    lying = whole[:8] + whole[8 : 8 + length].replace(b'"F32"', b'"F64"') + whole[8 + length :]
    for content in (b"", whole[:4], whole[:-1], whole + b"\0", (1 << 60).to_bytes(8, "little") + whole[8:], lying):
        file.write_bytes(content)
        assert f"{file} is damaged or not safetensors" in refused(folder)


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    float("nan"),
    10**30,
    "x",
    "",
    [],
    [1],
    ["a.b"],
    [[]],
    {},
    {"0": None},
    {"0": "a", "1": "a"},
]


@pytest.mark.parametrize("family", ["xl", "xmod-prenorm"])
def test_config_with_any_field_of_another_kind_is_refused_or_read(family, tmp_path):
    """Never another error than one line, nor hours spent on a hostile number."""
    folder = xlscale.save_pretrained(noisy(FAMILIES[family], "ForSequenceClassification"), tmp_path / "hub")
    whole = json.loads((folder / "config.json").read_text())
    refusals = 0
    for name in [*whole, "num_labels", "pruned_heads", "torch_dtype", "made_up"]:
        for junk in JUNK:
            content = {**whole, name: junk, **({"id2label": None} if name == "num_labels" else {})}
            (folder / "config.json").write_text(json.dumps(content))
            try:
                open_hub_folder(folder)
            except ValueError as error:
                assert "\n" not in str(error) and str(folder) in str(error)
                refusals += 1
    assert refusals > 300
    for text in ("[]", "1", "null", "[" * 100_000, '{"model_type": []}', "\x00", ""):
        (folder / "config.json").write_text(text)
        assert "config.json" in refused(folder)
