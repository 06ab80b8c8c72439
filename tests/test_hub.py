"""The Hub folder without transformers: bits, memory, atomicity, and one clear line for every bad folder."""

import json
import pickle
import re
import shutil
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from xlscale.checkpoint.head_names import HEAD_NAMES
from xlscale.checkpoint.hub import hub_writer, write_alone, write_hub_folder
from xlscale.checkpoint.hub_folder import read_hub_folder
from xlscale.checkpoint.hub_names import HF_NAMES, hf_names, shapes_of, wildcards
from xlscale.config_sections import ModelConfig
from xlscale.models.families import LAYOUTS, parameter_shapes
from xlscale.models.heads import HEADS

MODEL = ModelConfig(
    model_type="xlm-roberta-xl",
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)
SHAPES = parameter_shapes(MODEL)
VALUES = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, (name, shape) in enumerate(SHAPES.items())
}


def write(folder, read=VALUES.__getitem__, shapes=SHAPES, **options):
    return write_hub_folder(folder, MODEL, shapes, read, **options)


def edit(folder, change):
    """Change the tensors of a one-file folder by a function of the dict {Hub name: tensor}."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text()) | changes
    kept = {name: value for name, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "hub")


# Writing


@pytest.mark.parametrize("max_shard_size", [5_000_000_000, 3_000])
def test_what_is_written_is_read_back_to_the_bit(tmp_path, max_shard_size):
    folder = write(tmp_path / "a" / "hub", max_shard_size=max_shard_size)
    model, shapes, read = read_hub_folder(folder)
    assert model == MODEL and shapes == SHAPES
    for name, value in VALUES.items():
        assert torch.equal(read(name), value), name


def test_bf16_is_rounded_as_torch_rounds(tmp_path):
    _, _, read = read_hub_folder(write(tmp_path / "hub", dtype="bf16"))
    for name, value in VALUES.items():
        assert torch.equal(read(name), value.bfloat16()), name


def test_writing_holds_one_tensor_at_a_time(tmp_path):
    given = []

    def read(name):
        assert not [ref for ref in given if ref() is not None], f"an earlier tensor lives while {name} is read"
        tensor = VALUES[name].clone()
        given.append(weakref.ref(tensor))
        return tensor

    write(tmp_path / "hub", read, max_shard_size=3_000)
    assert len(given) == len(SHAPES)


def test_index_and_shards_name_each_other(tmp_path):
    folder = write(tmp_path / "hub", max_shard_size=3_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(value.numel() for value in VALUES.values())
    for file in folder.glob("*.safetensors"):
        held = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == held.keys()
        total = sum(4 * tensor.numel() for tensor in held.values())
        assert total <= 3_000 or len(held) == 1, "only a tensor larger than the limit is over it"


def test_metadata_is_what_transformers_asks_for_and_our_mark(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "writer": "xlscale",
        }  # 4.56 refuses a file without the first


def test_tied_decoder_is_never_written(folder):
    names = load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if name.startswith("lm_head.decoder")]
    assert "roberta.embeddings.token_type_embeddings.weight" in names


def test_interrupted_writing_leaves_the_old_folder_and_nothing_beside(folder):
    def read(name):
        if name == "encoder.final_norm.weight":
            raise KeyboardInterrupt
        return VALUES[name] + 1

    with pytest.raises(KeyboardInterrupt):
        write(folder, read)
    assert [path.name for path in folder.parent.iterdir()] == ["hub"]
    assert torch.equal(read_hub_folder(folder)[2]("head.dense.weight"), VALUES["head.dense.weight"])


def test_remains_of_killed_writings_are_cleared_and_a_folder_set_aside_comes_back(folder):
    folder.rename(folder.with_name(".hub.replaced"))  # killed between the two renames
    (folder.parent / ".hub.writing").mkdir()
    (folder.parent / ".hub.writing" / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="nan"):
        write(folder, lambda name: VALUES[name] * float("nan"))
    assert torch.equal(read_hub_folder(folder)[2]("head.dense.weight"), VALUES["head.dense.weight"])
    write(folder, lambda name: VALUES[name] + 1)
    assert torch.equal(read_hub_folder(folder)[2]("head.dense.weight"), VALUES["head.dense.weight"] + 1)
    assert [path.name for path in folder.parent.iterdir()] == ["hub"]


@pytest.mark.parametrize("extra", ["README.md", "pytorch_model.bin", "other.safetensors"])
def test_folder_with_something_of_others_is_not_replaced(folder, extra):
    if extra.endswith("safetensors"):
        save_file({"x": torch.zeros(1)}, folder / extra, {"format": "pt"})
    else:
        (folder / extra).write_text("mine")
    with pytest.raises(ValueError, match="holds what xlscale did not write; name another folder"):
        write(folder)
    assert (folder / extra).exists()


def test_folder_with_our_card_is_replaced_until_somebody_edits_it(tmp_path):
    def with_card(text):
        return write_alone(hub_writer(tmp_path / "hub", MODEL, SHAPES), lambda name: (VALUES[name],), text)

    with_card("first")
    card = with_card("second\n") / "README.md"
    assert card.read_text().startswith("second\n<!-- xlscale ")
    card.write_text(card.read_text() + "by hand\n")
    with pytest.raises(ValueError, match="holds what xlscale did not write"):
        with_card("third")
    assert card.read_text().endswith("by hand\n")


def test_pieces_of_a_tensor_are_written_as_the_whole_and_must_be_all_of_it(tmp_path):
    writer = hub_writer(tmp_path / "hub", MODEL, SHAPES)
    write_alone(writer, lambda name: VALUES[name].split(3))
    read = read_hub_folder(tmp_path / "hub")[2]
    assert all(torch.equal(read(name), value) for name, value in VALUES.items())
    for cut, shape in ((slice(0, -1), r"\(49, 16\)"), (slice(1, None), r"\(49, 16\)")):
        with pytest.raises(ValueError, match=rf"word.weight has shape {shape}, not \(50, 16\)"):
            write_alone(writer, lambda name, cut=cut: VALUES[name][cut].split(7))


def test_folder_saved_by_others_and_a_file_are_not_replaced(folder, tmp_path):
    edit(folder, lambda tensors: None)  # now without our mark
    (tmp_path / "file").write_text("mine")
    for target in (folder, tmp_path / "file"):
        with pytest.raises(ValueError, match="holds what xlscale did not write"):
            write(target)


def test_empty_folder_is_filled(tmp_path):
    (tmp_path / "hub").mkdir()
    assert read_hub_folder(write(tmp_path / "hub"))[0] == MODEL


def test_tokenizer_files_come_along_and_a_missing_one_is_refused(tmp_path):
    source = tmp_path / "tokenizer"
    source.mkdir()
    names = ["sentencepiece.bpe.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    for name in names[1:]:
        (source / name).write_text('{"model_max_length": 8192}' if name == "tokenizer_config.json" else name)
    with pytest.raises(ValueError, match=r"lacks \['sentencepiece.bpe.model'\]; a xlm-roberta-xl folder needs"):
        write(tmp_path / "hub", tokenizer_folder=source)
    assert not (tmp_path / "hub").exists()
    (source / names[0]).write_text(names[0])
    folder = write(tmp_path / "hub", tokenizer_folder=source)
    for name in names[:2] + names[3:]:
        assert (folder / name).read_text() == name
    # What the tokenizer is told is the model's own length, not that of the model it was made for.
    told = json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"]
    assert told == MODEL.max_position_embeddings - MODEL.pad_token_id - 1
    write(folder, tokenizer_folder=source)  # a folder with a tokenizer is ours too


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_value_that_is_not_finite_is_not_written(tmp_path, bad):
    def read(name):
        value = VALUES[name].clone()
        if name == "head.dense.weight":
            value[3, 5] = bad
        return value

    with pytest.raises(ValueError, match=rf"head.dense.weight holds {bad}; weights must be finite"):
        write(tmp_path / "hub", read)
    assert not list(tmp_path.iterdir())


def test_shapes_are_compared_before_anything_is_written(tmp_path):
    shapes = SHAPES | {"head.dense.weight": (16, 15), "head.decoder.weight": (50, 16)}
    del shapes["encoder.final_norm.bias"]
    with pytest.raises(ValueError) as caught:
        write(tmp_path / "hub", shapes=shapes)
    assert "1 missing (encoder.final_norm.bias)" in str(caught.value)
    assert "1 unexpected (head.decoder.weight)" in str(caught.value)
    assert "1 of another shape (head.dense.weight (16, 15) for (16, 16))" in str(caught.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"head.norm.bias has shape \(4,\), not \(16,\)"):
        write(tmp_path / "hub", lambda name: VALUES[name][:4] if name == "head.norm.bias" else VALUES[name])


def test_unknown_dtype_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"dtype='fp8'.*\['bf16', 'fp16', 'fp32'\]"):
        write(tmp_path / "hub", dtype="fp8")


# Reading


def refused(folder):
    """The one line that reading a bad folder gives."""
    with pytest.raises(ValueError) as caught:
        _, shapes, read = read_hub_folder(folder)
        for name in shapes:
            read(name)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    return message


BAD_TENSORS = {
    "missing": (lambda t: t.pop("lm_head.layer_norm.bias"), r"1 missing \(head.norm.bias\)"),
    "unexpected": (
        lambda t: t.update({"classifier.bias": torch.zeros(2)}),
        r"1 unexpected \(classifier.bias\)",
    ),
    "wrong shape": (
        lambda t: t.update({"lm_head.bias": torch.zeros(49)}),
        r"head.decoder.bias \(49,\) for \(50,\)",
    ),
    "not finite": (lambda t: t["lm_head.bias"].fill_(float("nan")), "head.decoder.bias holds nan"),
    "integers": (
        lambda t: t.update({"lm_head.bias": torch.zeros(50, dtype=torch.int8)}),
        "lm_head.bias has dtype I8",
    ),
    "untied": (
        lambda t: t.update({"lm_head.decoder.weight": torch.zeros(50, 16)}),
        "lm_head.decoder.weight differs from roberta.embeddings.word_embeddings.weight; only tied",
    ),
    "untied and smaller": (
        lambda t: t.update({"lm_head.decoder.bias": t["lm_head.bias"][:20].clone()}),
        "lm_head.decoder.bias differs from lm_head.bias",
    ),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensor_is_refused_by_name(folder, case):
    change, line = BAD_TENSORS[case]
    edit(folder, change)
    assert re.search(line, refused(folder))


def test_tensors_that_older_folders_hold_are_read(folder):
    def age(tensors):
        tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].clone()
        tensors["lm_head.decoder.bias"] = tensors.pop("lm_head.bias")
        tensors["roberta.embeddings.position_ids"] = torch.arange(12)[None]
        tensors["roberta.pooler.dense.bias"] = torch.zeros(16)

    edit(folder, age)
    _, shapes, read = read_hub_folder(folder)
    assert shapes == SHAPES
    assert torch.equal(read("head.decoder.bias"), VALUES["head.decoder.bias"])


BAD_CONFIGS = {
    "field of another family": ({"adapter_reduction_factor": 2}, "adapter_reduction_factor=2 is unknown"),
    "positions": ({"position_embedding_type": "rotary"}, 'model.position_embedding_type = "rotary" must be one of'),
    "encoder-decoder": ({"is_encoder_decoder": True}, "is_encoder_decoder=True must be False"),
    "cross-attention": ({"add_cross_attention": True}, "set is_decoder = true"),
    "labels": ({"num_labels": 3}, "num_labels=3 is not that of id2label, 2"),
    "label numbers": ({"label2id": {"LABEL_0": 1}}, "label2id={'LABEL_0': 1} is not id2label turned round"),
    "label names": ({"id2label": {"0": "no", "2": "yes"}, "label2id": None}, 'name "0" to "1"'),
    "type of labels": ({"id2label": ["no", "yes"]}, "id2label=['no', 'yes'] must be a table of strings"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings=False must be True"),
    "missing": ({"layer_norm_eps": ...}, "layer_norm_eps is missing"),
    "type": ({"hidden_size": "16"}, "hidden_size='16' must be an integer"),
    "activation": ({"hidden_act": "mish"}, 'model.hidden_act = "mish" must be one of'),
    "family": ({"model_type": "bert"}, "model_type='bert' is not a family; use one of"),
    "heads": ({"num_attention_heads": 3}, "num_attention_heads = 3"),
    "other shape": ({"intermediate_size": 32}, "do not fit the config: 6 of another shape"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_field_that_cannot_be_honoured_is_refused(folder, case):
    changes, line = BAD_CONFIGS[case]
    edit_config(folder, **changes)
    assert line in refused(folder)


def test_all_problems_of_a_config_are_shown_at_once(folder):
    edit_config(folder, is_encoder_decoder=True, adapter_reduction_factor=2, vocab_size=...)
    message = refused(folder)
    assert all(name in message for name in ("is_encoder_decoder", "adapter_reduction_factor", "vocab_size is missing"))


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickle_is_refused_and_not_run(folder, name):
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    message = refused(folder)
    assert name in message and ("pickle" in message or "damaged or not safetensors" in message)


def test_file_cut_short_is_refused_by_name(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert f"{file} is damaged" in refused(folder)


def test_missing_files_are_refused_by_name(tmp_path):
    folder = write(tmp_path / "hub", max_shard_size=3_000)
    index = folder / "model.safetensors.index.json"
    second = sorted(folder.glob("model-00002-of-*"))[0]
    second.rename(tmp_path / second.name)
    assert f"names ['{second.name}'], not in the folder" in refused(folder)
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    assert f"names ['../{second.name}'], not in the folder" in refused(folder)
    index.write_text("[]")
    assert "is not an index" in refused(folder)
    index.unlink()
    assert "has none of model.safetensors," in refused(folder)
    (folder / "config.json").write_text("{")
    assert "is not JSON" in refused(folder)
    (folder / "config.json").unlink()
    assert "config.json does not exist" in refused(folder)
    shutil.rmtree(folder)
    assert "is not a folder" in refused(folder)


# Names


def family_models():
    """One of each family, with all that a config can add to it."""
    adapters = {"languages": ["en_XX", "de_DE"], "adapter_layer_norm": True}
    for family in LAYOUTS:
        decoder = {"is_decoder": True, "add_cross_attention": True, "position_embedding_type": "relative_key"}
        for extra in ({}, decoder, *([{"pre_norm": True}] if family == "xmod" else [])):
            yield ModelConfig(
                **{**vars(MODEL), "model_type": family, **extra, **(adapters if family == "xmod" else {})}
            )


@pytest.mark.parametrize("head", HEADS)
def test_names_are_one_to_one(head):
    for model in family_models():
        names = hf_names(model, head)
        assert len(set(names.values())) == len(names) and names.keys() == shapes_of(model, head).keys()


def test_every_row_of_the_tables_is_used():
    used = set()
    for model in family_models():
        for head in HEADS:
            used |= {wildcards(name.rsplit(".", 1)[0])[0] for name in hf_names(model, head)}
    assert used == HF_NAMES.keys() | HEAD_NAMES.keys()
