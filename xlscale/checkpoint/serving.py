"""Adapters put into a loaded model: read from a file or a folder, and held against the model's trunk as it is now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xlscale.checkpoint.adapter_file import (
    AdapterSource,
    adapter_names,
    open_adapters,
)
from xlscale.checkpoint.trunk import (
    KNOWN,
    PARTS,
    PIECE,
    IsPart,
    Named,
    Trunk,
    mismatch,
    model_flags,
    precision,
)
from xlscale.checkpoint.weights import READABLE
from xlscale.config_values import nearest
from xlscale.models.bare import OnEncoder


class AdapterReader:
    """Reads adapters for a model that came from a folder, as OnEncoder.reads_adapters.

    dtype: of the folder's weights. new_head: whether the model's head is not the folder's, and so not what adapters
    were made on.
    """

    def __init__(self, dtype: torch.dtype, new_head: bool):
        self.dtype, self.new_head = dtype, new_head
        self._seen: tuple[Any, Trunk] | None = None
        self._folder: AdapterSource | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AdapterReader, (self.dtype, self.new_head)

    def __call__(
        self, model: OnEncoder, source: str | Path, language: str, other_trunk: bool
    ) -> Callable[[str], Tensor]:
        """Our name without "encoder." -> tensor; ValueError in one line unless the adapters fit the model."""
        if not model.config.languages:
            raise ValueError(f"a model of type {model.config.model_type} has no adapters; use an xmod model")
        parts = () if other_trunk else [part for part in PARTS if not (self.new_head and part == "head")]
        opened = open_adapters(Path(source), self._folder)
        if opened.folder is not None:
            self._folder = opened
        if language not in opened.languages:
            there = nearest(language, opened.languages) if opened.languages else "; it is no xmod model"
            raise ValueError(f"{source} has no adapters of {language}{there}")
        if refusal := mismatch(str(source), opened.trunk, self._trunk(model), parts):
            raise ValueError(refusal)
        adapters = opened.languages[language]
        names = adapter_names(model.config, language)
        return lambda ours: adapters.read(names[f"encoder.{ours}"])

    def _trunk(self, model: OnEncoder) -> Trunk:
        """The model's; what was digested of it is kept until a parameter has changed: billions of them take seconds.

        A change through `parameter.data` is hidden from torch, and from this; a step of an optimizer is not.
        """
        parameters = {name: value for name, value in model.named_parameters() if ".adapters." not in name}
        state = [(n, v.data_ptr(), 0 if v.is_inference() else v._version) for n, v in parameters.items()]
        if self._seen is None or self._seen[0] != state:
            self._seen = state, model_trunk(model, self.dtype, parameters)
        return self._seen[1]


def model_trunk(model: OnEncoder, dtype: torch.dtype, parameters: dict[str, nn.Parameter]) -> Trunk:
    """The trunk of a model in memory, whose weights came in `dtype` and can have lost, but not won, by a conversion."""
    held = {value.dtype for value in parameters.values()}
    now = held.pop() if len(held) == 1 and held <= set(READABLE.values()) else torch.float32
    formats = KNOWN[precision(dtype if precision(dtype) in KNOWN[precision(now)] else now)]

    def tensors(is_part: IsPart) -> Named:
        for name in sorted(filter(is_part, parameters)):
            value = parameters[name]
            yield name, value.shape, value.split(max(1, PIECE // torch.Size(value.shape[1:]).numel()))

    return Trunk(model_flags(model.config), formats, tensors)
