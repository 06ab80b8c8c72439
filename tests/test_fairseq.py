"""fairseq's model.pt: its names of every year, the config that it tells, and what is refused."""

import dataclasses
import logging
import re
from argparse import Namespace

import pytest
import torch
from safetensors.torch import load_file

import xlscale
from tests.hub_folders import FAMILIES, assert_same, noisy, refused
from xlscale.checkpoint.fairseq import FAIRSEQ_NAMES
from xlscale.checkpoint.hub_names import hf_names
from xlscale.checkpoint.importers import import_folder


def fairseq_state(model, old=False):
    """A masked LM's tensors as fairseq names them; `old`: as in 2019, with one matrix for query, key and value."""
    renamed = {}
    for name, value in model.state_dict().items():
        for ours, theirs in (
            ("encoder.embeddings.word", "encoder.sentence_encoder.embed_tokens"),
            ("encoder.embeddings.position", "encoder.sentence_encoder.embed_positions"),
            ("encoder.embeddings.norm", "encoder.sentence_encoder.layernorm_embedding"),
            ("encoder.final_norm", "encoder.sentence_encoder.layer_norm"),
            ("encoder.layers", "encoder.sentence_encoder.layers"),
            ("attention.output", "self_attn.out_proj"),
            ("attention_norm", "self_attn_layer_norm"),
            ("mlp_norm", "final_layer_norm"),
            ("mlp.up", "fc1"),
            ("mlp.down", "fc2"),
            ("adapters", "adapter_modules"),
            ("adapter_norm", "adapter_layer_norm"),
            (".down.", ".fc1."),
            (".up.", ".fc2."),
            ("head.dense", "encoder.lm_head.dense"),
            ("head.norm", "encoder.lm_head.layer_norm"),
            ("head.decoder", "encoder.lm_head"),
        ):
            name = name.replace(ours, theirs)
        renamed[re.sub(r"attention\.(q|k|v)(uery|ey|alue)", r"self_attn.\1_proj", name)] = value
    del renamed["encoder.embeddings.token_type.weight"]
    if old:
        for name in [key for key in renamed if ".q_proj." in key]:
            parts = [renamed.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
            renamed[name.replace("q_proj.", "in_proj_")] = torch.cat(parts)
        renamed = {key.replace("layernorm_embedding", "emb_layer_norm"): value for key, value in renamed.items()}
        renamed = {"decoder" + key.removeprefix("encoder"): value for key, value in renamed.items()}
        renamed["decoder.sentence_encoder.version"] = torch.tensor([3.0])
    return renamed


def settings(config):
    """fairseq's of a model, more of them than are read."""
    given = {
        "arch": "roberta_large",
        "encoder_embed_dim": config.hidden_size,
        "encoder_layers": config.num_hidden_layers,
        "encoder_attention_heads": config.num_attention_heads,
        "encoder_ffn_embed_dim": config.intermediate_size,
        "activation_fn": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "encoder_normalize_before": config.pre_norm or config.model_type == "xlm-roberta-xl",
        "lr": [0.0004],
        "save_dir": None,
    }
    if config.languages:
        given |= {
            "languages": config.languages,
            "bottleneck": config.adapter_reduction_factor,
            "adapter_layer_norm": config.adapter_layer_norm,
            "adapter_reuse_layer_norm": config.adapter_reuse_layer_norm,
            "ln_before_adapter": config.ln_before_adapter,
        }
    return given


def write_fairseq(folder, model, old=False, **changes):
    folder.mkdir()
    given = settings(model.config) | changes
    if model.config.model_type != "roberta":
        (folder / "sentencepiece.bpe.model").write_bytes(b"")
    told = {"args": Namespace(**given), "cfg": None} if old else {"args": None, "cfg": {"model": given, "task": {}}}
    content = {**told, "model": fairseq_state(model, old), "extra_state": {"epoch": 3}, "optimizer_history": []}
    torch.save(content, folder / "model.pt")
    return folder


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_fairseq_checkpoint_gives_the_same_model(family, old, tmp_path):
    config = dataclasses.replace(FAMILIES[family], type_vocab_size=1, num_labels=2, id2label={}, default_language="")
    model = noisy(config)
    with torch.no_grad():
        model.encoder.embeddings.token_type.weight.zero_()  # fairseq has none
    folder = write_fairseq(tmp_path / "fairseq", model, old)
    assert_same(xlscale.load_pretrained(folder), model)
    assert_same(xlscale.load_pretrained(folder / "model.pt"), model)
    (folder / "sentencepiece.bpe.model").unlink(missing_ok=True)
    xlscale.save_pretrained(model, tmp_path / "wanted")
    (folder / "config.json").write_bytes((tmp_path / "wanted/config.json").read_bytes())  # now it need not guess
    imported = import_folder(folder, tmp_path / "imported")
    assert load_file(imported / "model.safetensors").keys() == set(hf_names(config).values())
    assert (imported / "model.safetensors").read_bytes() == (tmp_path / "wanted/model.safetensors").read_bytes()
    assert xlscale.load_pretrained(folder, "Model").pooler is None


def test_every_row_of_fairseqs_table_is_used():
    rows = {re.sub(r"\.\d+\.", ".N.", name.rsplit(".", 1)[0]) for f in FAMILIES.values() for name in hf_names(f)}
    rows = {re.sub(r"adapters\.\w+", "adapters.L", row) for row in rows}
    assert rows - {"encoder.embeddings.token_type"} == FAIRSEQ_NAMES.keys()


def test_bad_fairseq_files_are_refused(tmp_path):
    model = noisy(dataclasses.replace(FAMILIES["xl"], num_labels=2))
    changes = {
        "heads": ({"encoder_attention_heads": None}, "num_attention_heads=None must be an integer"),
        "odd heads": ({"encoder_attention_heads": 5}, "num_attention_heads = 5 must divide"),
        "layers": ({"encoder_layers": 3}, "encoder_layers=3 but its tensors have 2"),
        "norm": ({"encoder_normalize_before": False}, "encoder_normalize_before=False but its tensors have True"),
        "activation": ({"activation_fn": "relu"}, "activation_fn='relu' but its tensors have 'gelu'"),
        "dropout": ({"dropout": "much"}, "hidden_dropout_prob='much' must be a number"),
    }
    for case, (change, words) in changes.items():
        line = refused(write_fairseq(tmp_path / case, model, **change), tmp_path / "out")
        assert words in line and "config.json" in line, (case, line)

    folder = write_fairseq(tmp_path / "f", model)
    content = torch.load(folder / "model.pt", weights_only=True)
    state = content["model"]
    less = {key: value for key, value in state.items() if "fc1" not in key}
    tied = {**state, "encoder.lm_head.weight": state["encoder.lm_head.weight"] + 1}
    more = {**state, "classification_heads.mnli.dense.weight": torch.zeros(2)}
    for case, (written, words) in {
        "no settings": ({"model": state}, "put a config.json beside it"),
        "no layers": ({"model": less, "args": Namespace(encoder_attention_heads=2)}, "is not fairseq's RoBERTa"),
        "untied": ({**content, "model": tied}, "only tied weights can be read"),
        "more": ({**content, "model": more}, "1 unexpected (classification_heads.mnli.dense.weight)"),
        "enum": ({**content, "extra_state": logging.getLogger()}, "a pickle that asks for logging"),
    }.items():
        torch.save(written, folder / "model.pt")
        line = refused(folder)
        assert words in line, (case, line)
    (tmp_path / "other").mkdir()
    torch.save({"model": {"x": torch.zeros(2)}}, tmp_path / "other/model.pt")
    assert "config.json does not exist" in refused(tmp_path / "other")


def test_fairseq_dictionary_of_another_order_is_refused(tiny_tokenizer_folder, tiny_tokenizer, tmp_path):
    model = noisy(dataclasses.replace(FAMILIES["xlm-roberta"], vocab_size=500, id2label={}))
    folder = write_fairseq(tmp_path / "fairseq", model)
    (folder / "sentencepiece.bpe.model").write_bytes((tiny_tokenizer_folder / "sentencepiece.bpe.model").read_bytes())
    pieces = [tiny_tokenizer.token(i) for i in tiny_tokenizer.pieces]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in [*pieces, "madeupword0000"]))
    assert (import_folder(folder, tmp_path / "good") / "tokenizer.json").is_file()
    pieces[7], pieces[8] = pieces[8], pieces[7]
    (folder / "dict.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    with pytest.raises(ValueError, match=r"dict.txt: id 11 is .* there and .* in the tokenizer"):
        import_folder(folder, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
