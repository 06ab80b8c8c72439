"""A model of any head from a Hub folder, and back."""

import logging
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlscale.checkpoint.hub import write_hub_folder
from xlscale.checkpoint.hub_folder import HubFolder, open_hub_folder
from xlscale.checkpoint.serving import AdapterReader
from xlscale.checkpoint.tensor_file import DTYPES
from xlscale.models.bare import Model, OnEncoder
from xlscale.models.heads import HEADS
from xlscale.tokenizer_hub import HubTokenizer

log = logging.getLogger(__name__)

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def load_pretrained(
    folder: str | Path,
    head: str | None = None,
    *,
    languages: Sequence[str] | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    **changes: Any,
) -> OnEncoder:
    """The model of a Hub folder (safetensors or .bin) or of fairseq's model.pt, on the CPU, in evaluation mode.

    head: "Model", "ForMaskedLM", "ForSequenceClassification", ...; None = as the folder's config.json says. What a head
    other than the folder's needs besides is drawn from `seed`, and a warning says so. languages: of an xmod model read
    the adapters of these only; a language's id is its place here. dtype: None = the files'. changes: fields of the
    config that shall differ, as num_labels=5 or hidden_dropout_prob=0.0.
    ValueError, in one line, for a folder that cannot be read or honoured.
    """
    opened = open_hub_folder(folder, head, seed, **changes)
    if languages is not None:
        opened = opened.with_languages(languages)
    if opened.new:
        log.warning("%s", opened.news())
    model = build_model(opened, dtype or opened.dtype)
    model.reads_adapters = AdapterReader(opened.dtype, bool(opened.new))
    return model


def build_model(opened: HubFolder, dtype: torch.dtype) -> OnEncoder:
    """The model of an open folder; no memory but its own and a part of one tensor."""
    with torch.device("meta"):
        if opened.head == "Model":
            model: OnEncoder = Model(opened.model, pooler="pooler.dense.weight" in opened.shapes)
        else:
            model = HEADS[opened.head](opened.model)
    made: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters():  # the tied one once
        # A copy: what was read is a view of the file, which somebody may change.
        made[id(parameter)] = nn.Parameter(_copy(opened.read(name), dtype), parameter.requires_grad)
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, made[id(parameter)])
    left = [name for name, buffer in model.named_buffers() if buffer.is_meta]
    assert not left, f"buffers {left} hold what only a real device computes"
    return model.eval()


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype).copy_(tensor)


def save_pretrained(
    model: OnEncoder,
    folder: str | Path,
    tokenizer: str | Path | HubTokenizer | None = None,
    max_shard_size: int | str = "5GB",
    adapters: bool = False,
) -> Path:
    """Write a model as the folder that transformers 4.56 and 5.x load, in the dtype of its weights.

    tokenizer: one of ours, or the folder of one. max_shard_size: bytes of a file, or as "5GB". adapters: write every
    language's adapters in a file of their own too. The folder appears whole or not at all; ValueError for values that
    are not finite, and for a folder that xlscale did not write.
    """
    parameters = dict(model.named_parameters())
    found = {parameter.dtype for parameter in parameters.values()}
    names = [name for name, (dtype, _, _) in DTYPES.items() if found == {dtype}]
    if not names:
        raise ValueError(f"weights of {sorted(map(str, found))} cannot be saved; use .to() for one of {sorted(DTYPES)}")
    with tempfile.TemporaryDirectory() as files:
        if isinstance(tokenizer, HubTokenizer):
            tokenizer.save(files)
            tokenizer = files
        return write_hub_folder(
            folder,
            model.config,
            {name: tuple(parameter.shape) for name, parameter in parameters.items()},
            lambda name: parameters[name].detach(),
            tokenizer_folder=tokenizer,
            dtype=names[0],
            max_shard_size=bytes_of(max_shard_size),
            head=model.architecture,
            adapters=adapters,
        )


def bytes_of(size: int | str) -> int:
    """5_000_000_000 of "5GB"; also KB, MB, TB and KiB, MiB, GiB. ValueError for anything else."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", str(size))
    unit = UNITS.get(found[2].upper()) if found else None
    if not found or unit is None or float(found[1]) * unit < 1:
        raise ValueError(f"max_shard_size={size!r} is not a size; write it as 5GB or 500MiB")
    return int(float(found[1]) * unit)
