"""xlscale.load_pretrained and save_pretrained: every family and head, both ways, and the command `import`."""

import dataclasses
import json
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import xlscale
from tests.hub_folders import FAMILIES, IDS, Bomb, as_bin, assert_same, noisy
from xlscale.checkpoint.hub_folder import open_hub_folder
from xlscale.checkpoint.importers import import_folder
from xlscale.checkpoint.pretrained import bytes_of
from xlscale.checkpoint.weights import WeightsFile
from xlscale.models.bare import Model
from xlscale.models.heads import HEADS, MaskedLM
from xlscale.tokenizer import SentencePieceTokenizer


@pytest.fixture
def folder(tmp_path):
    return xlscale.save_pretrained(noisy(FAMILIES["xl"]), tmp_path / "hub")


# Both directions


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_loaded_to_the_bit(family, head, tmp_path):
    config = FAMILIES[family]
    model = noisy(config if head != "ForQuestionAnswering" else dataclasses.replace(config, num_labels=2), head)
    folder = xlscale.save_pretrained(model, tmp_path / "hub")
    loaded = xlscale.load_pretrained(folder)
    assert_same(loaded, model)
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    # Again, through the command's way: another folder, the same bytes.
    again = import_folder(folder, tmp_path / "again")
    assert {path.name: path.read_bytes() for path in again.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_loaded_model_computes_the_same_and_its_decoder_stays_tied(folder):
    wanted, loaded = noisy(FAMILIES["xl"]), xlscale.load_pretrained(folder)
    assert torch.equal(loaded(IDS).logits, wanted(IDS).logits)
    assert loaded.head.decoder.weight is loaded.encoder.embeddings.word.weight


@pytest.mark.parametrize("pooler", [True, False])
def test_bare_model_has_a_pooler_where_the_folder_has_one(pooler, tmp_path):
    model = noisy(FAMILIES["xlm-roberta"], "Model", pooler=pooler)
    folder = xlscale.save_pretrained(model, tmp_path / "hub")
    assert "embeddings.word_embeddings.weight" in load_file(folder / "model.safetensors")  # as transformers: no prefix
    assert_same(xlscale.load_pretrained(folder), model)


def test_model_of_training_is_saved_as_a_masked_lm(tmp_path):
    model = MaskedLM(FAMILIES["xl"]).eval()
    folder = xlscale.save_pretrained(model, tmp_path / "hub", max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert dict(xlscale.load_pretrained(folder).named_parameters()).keys() == dict(model.named_parameters()).keys()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_unless_another_is_asked_for(dtype, tmp_path):
    model = noisy(FAMILIES["xl"]).to(dtype)
    folder = xlscale.save_pretrained(model, tmp_path / "hub")
    assert json.loads((folder / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert_same(xlscale.load_pretrained(folder), model)
    assert_same(xlscale.load_pretrained(folder, dtype=torch.float32), model.float())


def test_loaded_weights_do_not_change_with_the_file(folder):
    loaded = xlscale.load_pretrained(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(0, os.SEEK_END)
        file.seek(file.tell() - 100_000 if file.tell() > 100_000 else 10_000)
        file.write(b"\xff" * 4000)
    assert_same(loaded, noisy(FAMILIES["xl"]))


def test_language_chosen_since_is_saved(tmp_path):
    model = noisy(FAMILIES["xmod"])
    model.set_default_language("en_XX")
    folder = xlscale.save_pretrained(model, tmp_path / "hub")
    assert xlscale.load_pretrained(folder).config.default_language == "en_XX"


def test_tokenizer_comes_along_as_an_object_and_as_a_folder(tiny_tokenizer_folder, tmp_path):
    model = noisy(dataclasses.replace(FAMILIES["xl"], vocab_size=500))
    tokenizer = SentencePieceTokenizer.load(tiny_tokenizer_folder)
    first = xlscale.save_pretrained(model, tmp_path / "a", tokenizer)
    second = xlscale.save_pretrained(model, tmp_path / "b", tiny_tokenizer_folder)
    for name in ("sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    # It comes along when imported, and is made anew from its vocabulary where the rest is missing.
    (second / "tokenizer.json").unlink()
    imported = import_folder(second, tmp_path / "c")
    assert (imported / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


# Another head than the folder's


def test_other_head_reads_the_encoder_and_says_what_it_drew(folder, caplog):
    with caplog.at_level(logging.WARNING, "xlscale"):
        model = xlscale.load_pretrained(folder, "ForSequenceClassification", num_labels=5, seed=3)
    assert model.config.num_labels == 5 and model.classifier.output.weight.shape == (5, 16)
    assert "classifier.dense.weight, classifier.dense.bias, classifier.output.weight" in caplog.text
    wanted = dict(noisy(FAMILIES["xl"]).encoder.named_parameters())
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    assert 0.01 < model.classifier.output.weight.std() < 0.03 and not model.classifier.output.bias.any()
    again = xlscale.load_pretrained(folder, "ForSequenceClassification", num_labels=5, seed=3)
    assert torch.equal(again.classifier.dense.weight, model.classifier.dense.weight)


def test_masked_and_causal_heads_share_their_weights(folder, caplog):
    with caplog.at_level(logging.WARNING, "xlscale"):
        model = xlscale.load_pretrained(folder, "ForCausalLM", is_decoder=True)
    assert not caplog.text and model.config.is_decoder
    wanted = dict(noisy(FAMILIES["xl"]).named_parameters())
    assert all(torch.equal(parameter, wanted[name]) for name, parameter in model.named_parameters())


def test_masked_lm_gives_a_bare_model_without_pooler_and_a_classifier_no_foreign_classifier(folder, tmp_path):
    model = xlscale.load_pretrained(folder, "Model")
    assert type(model) is Model and model.pooler is None
    tokens = xlscale.save_pretrained(noisy(FAMILIES["xl"], "ForTokenClassification"), tmp_path / "tokens")
    chosen = xlscale.load_pretrained(tokens, "ForMultipleChoice")  # whose classifier has the same name
    assert chosen.classifier.weight.shape == (1, 16) and not chosen.classifier.bias.any()


def test_unknown_head_and_field_and_no_architecture_are_refused(folder):
    with pytest.raises(ValueError, match="head='ForNextWord' is not known; use one of Model, ForMaskedLM"):
        xlscale.load_pretrained(folder, "ForNextWord")
    with pytest.raises(ValueError, match="num_label: not a field of a model's config"):
        xlscale.load_pretrained(folder, num_label=2)
    with pytest.raises(ValueError, match=r"model.num_labels = 0 is too small"):
        xlscale.load_pretrained(folder, "ForTokenClassification", num_labels=0)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in content.items() if k != "architectures"}))
    with pytest.raises(ValueError, match="give head= as one of"):
        xlscale.load_pretrained(folder)
    assert_same(xlscale.load_pretrained(folder, "ForMaskedLM"), noisy(FAMILIES["xl"]))


# What is refused, and the command


def test_save_refuses_sizes_dtypes_and_folders_of_others(tmp_path, folder):
    model = noisy(FAMILIES["xl"])
    for size in ("five", "5XB", "-1", "", "0", 0, "1e3"):
        with pytest.raises(ValueError, match="is not a size; write it as 5GB"):
            xlscale.save_pretrained(model, tmp_path / "out", max_shard_size=size)
    assert bytes_of("5GB") == 5_000_000_000 and bytes_of("1.5 kib") == 1536 and bytes_of(7) == 7
    with pytest.raises(ValueError, match=r"weights of \['torch.float64'\] cannot be saved"):
        xlscale.save_pretrained(noisy(FAMILIES["xl"]).double(), tmp_path / "out")
    model.head.dense.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"head.dense.weight holds nan"):
        xlscale.save_pretrained(model, tmp_path / "out")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds what xlscale did not write"):
        xlscale.save_pretrained(noisy(FAMILIES["xl"]), folder)
    assert not (tmp_path / "out").exists()


def test_fp16_that_overflows_is_refused(tmp_path):
    model = noisy(FAMILIES["xl"])
    model.head.dense.weight.data[0, 0] = 1e6
    folder = xlscale.save_pretrained(model, tmp_path / "hub")
    with pytest.raises(ValueError, match=r"head.dense.weight holds inf"):
        import_folder(folder, tmp_path / "out", "fp16")
    assert not (tmp_path / "out").exists()


def test_rows_of_a_tensor_are_read_alone(tmp_path, folder):
    opened = open_hub_folder(folder)
    view = opened.rows("encoder.layers.1.mlp.up.weight", 3, 5)
    assert view.shape == (2, 16) and torch.equal(view, opened.read("encoder.layers.1.mlp.up.weight")[3:5])
    assert WeightsFile(folder / "model.safetensors").is_mapped and opened.is_mapped


def test_command_imports_and_refuses_in_one_line(folder, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "xlscale.cli", "import", *map(str, arguments)],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = command(as_bin(folder), "--out", tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / "out"), done.stderr
    assert_same(xlscale.load_pretrained(tmp_path / "out"), noisy(FAMILIES["xl"]).bfloat16())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb("x")))
    done = command(folder, "--out", tmp_path / "none")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and done.stdout == "", done.stderr
    done = command(tmp_path / "nowhere", "--out", tmp_path / "none")
    assert done.returncode == 2 and "nowhere is not a folder" in done.stderr


def test_xlscale_itself_imports_no_torch():
    code = "import sys, xlscale; print('torch' in sys.modules, callable(xlscale.load_pretrained))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False True", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'load_pretraine'"):
        xlscale.load_pretraine  # noqa: B018
