"""Small models of every family, their folders in the formats of others, and how a bad one is refused."""

import json
import os
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file

import xlscale
from xlscale.checkpoint.importers import import_folder
from xlscale.config_sections import ModelConfig
from xlscale.models.heads import HEADS

SMALL = {
    "vocab_size": 60,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 12,
}
XMOD = {"languages": ["en_XX", "de_DE"], "default_language": "de_DE"}
FAMILIES = {
    "roberta": ModelConfig(model_type="roberta", type_vocab_size=2, **SMALL),
    "xlm-roberta": ModelConfig(model_type="xlm-roberta", id2label={"0": "no", "1": "yes"}, **SMALL),
    "xl": ModelConfig(model_type="xlm-roberta-xl", num_labels=3, **SMALL),
    "xmod": ModelConfig(model_type="xmod", **XMOD, **SMALL),
    "xmod-prenorm": ModelConfig(
        model_type="xmod",
        pre_norm=True,
        adapter_layer_norm=True,
        ln_before_adapter=False,
        adapter_reduction_factor=4,
        **XMOD,
        **SMALL,
    ),
}
IDS = torch.arange(4, 12)[None]


def noisy(config, head="ForMaskedLM", seed=0, **options):
    """A model whose every parameter differs from every other, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    model = HEADS[head](config, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def assert_same(found, wanted):
    assert type(found) is type(wanted) and found.config == wanted.config
    ours, theirs = dict(found.named_parameters()), dict(wanted.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in theirs.items():
        assert ours[name].dtype == parameter.dtype and torch.equal(ours[name], parameter), name


def as_bin(folder, files=1, **options):
    """Turn a folder's weights into torch pickles, as transformers 4 wrote them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if files == 1:
        torch.save(OrderedDict(tensors), folder / "pytorch_model.bin", **options)
        return folder
    names, weight_map = sorted(tensors), {}
    for i in range(files):
        name = f"pytorch_model-{i + 1:05d}-of-{files:05d}.bin"
        torch.save({key: tensors[key].clone() for key in names[i::files]}, folder / name, **options)
        weight_map |= dict.fromkeys(names[i::files], name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


class Bomb:
    """Reduced to a call that leaves a file behind when it is run."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refused(source, out=None):
    """The one line with which load and import refuse a source; nothing is written."""
    out = source.parent / "out" if out is None else out
    lines = []
    for use in (xlscale.load_pretrained, lambda path: import_folder(path, out)):
        with pytest.raises(ValueError) as caught:
            use(source)
        lines.append(str(caught.value))
    assert lines[0] == lines[1] and "\n" not in lines[0] and len(lines[0]) < 600 and str(source) in lines[0]
    assert not out.exists() and not list(out.parent.glob(".out*"))
    return lines[0]
