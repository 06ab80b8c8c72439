"""What language adapters rest on, by facts and digests: models with the same may exchange their adapters.

A digest is sha256 over every tensor in the order of our names: its name and shape, then its values, little-endian, row
after row, in one number format. A file tells its values in its own format and in every one to which it can be exported,
and two are held against each other in the finest that both know. So fp32 weights and their bf16 export are the same
trunk, two bf16 exports of fp32 weights that differ below bf16's precision are too, and two fp32 trunks must be equal to
the bit. bf16 and fp16 know nothing of each other.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from xlscale.checkpoint.hub_folder import HubFolder
from xlscale.checkpoint.tensor_file import DTYPES
from xlscale.config_sections import ModelConfig

# Number format -> those in which its values are known, the finest first.
KNOWN = {"fp32": ("fp32", "bf16", "fp16"), "bf16": ("bf16",), "fp16": ("fp16",)}
# What shapes adapters, and what a trunk's tensors do not say of it.
FLAGS = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "pre_norm",
    "adapter_reduction_factor", "adapter_layer_norm", "adapter_reuse_layer_norm", "ln_before_adapter",
)  # fmt: skip
EMBEDDINGS = "encoder.embeddings."
IsPart = Callable[[str], bool]
# Part -> whether a parameter of the model is of it. Classifiers are in none: adapters serve any.
PARTS: dict[str, IsPart] = {
    "base": lambda name: name.startswith("encoder.") and not name.startswith(EMBEDDINGS) and ".adapters." not in name,
    "embeddings": lambda name: name.startswith(EMBEDDINGS),
    "head": lambda name: name.startswith("head."),
}
WHAT = {
    "base": "the trunk's layers are others",
    "embeddings": "the embeddings are others, as after new vocabulary",
    "head": "the language model's head is another",
}
PIECE = 1 << 22
"""Elements read at a time."""

Named = Iterable[tuple[str, Sequence[int], Iterable[Tensor]]]
"""Name, shape and rows of tensors, in the order of their names."""
Digests = dict[str, str]
"""Number format -> digest."""


def precision(dtype: torch.dtype) -> str:
    """Our name of a number format of weights."""
    return next(name for name, (kept, _, _) in DTYPES.items() if kept == dtype)


def digests(tensors: Named, formats: Iterable[str]) -> Digests:
    """The digests of tensors in several number formats, in one reading."""
    hashes = {name: hashlib.sha256() for name in formats}
    for name, shape, pieces in tensors:
        for found in hashes.values():
            found.update(f"{name} {list(shape)}\n".encode())
        for piece in pieces:
            for kind, found in hashes.items():
                values = piece.detach().to(device="cpu", dtype=DTYPES[kind][0]).contiguous()
                found.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return {name: found.hexdigest() for name, found in hashes.items()}


def finest(one: Iterable[str], other: Iterable[str]) -> str | None:
    """The finest number format that both know; None where there is none."""
    return next((name for name in KNOWN["fp32"] if name in one and name in other), None)


class Trunk:
    """A model without its language adapters, as it stands for comparisons; it is read when they come."""

    def __init__(self, flags: dict[str, Any], formats: Sequence[str], tensors: Callable[[IsPart], Named]):
        self.flags, self.formats = flags, formats
        """formats: in which its values are known, the finest first."""
        self._tensors = tensors
        self._found: dict[str, Digests] = {}

    def digests(self, part: str, formats: Sequence[str] = ()) -> Digests:
        """Of a part in the formats asked for, by default in all of `formats`, in one reading; {} where it has none."""
        found = self._found.setdefault(part, {})
        wanted = [kind for kind in formats or self.formats if kind not in found]
        tensors = list(self._tensors(PARTS[part])) if wanted else []
        if tensors:
            found |= digests(tensors, wanted)
        return dict(found)

    @classmethod
    def told(cls, flags: dict[str, Any], parts: dict[str, Digests]) -> "Trunk":
        """A trunk of which only flags and digests are known."""
        trunk = cls(flags, tuple(parts["base"]), lambda is_part: ())
        trunk._found = parts
        return trunk


def mismatch(where: str, theirs: Trunk, ours: Trunk, parts: Iterable[str] = PARTS) -> str:
    """How the trunk on which adapters were made differs from ours, in one line; "" when it does not.

    parts: those that are compared, besides the flags, where both models have them.
    """
    other = {name: mine for name, mine in ours.flags.items() if theirs.flags[name] != mine}
    problems = [f"{name} is {theirs.flags[name]!r} there and {mine!r} here" for name, mine in other.items()]
    kind = finest(theirs.formats, ours.formats)
    if kind is None and not problems:
        return (
            f"{where} knows its trunk in {'/'.join(theirs.formats)} only, which cannot be held against "
            f"{'/'.join(ours.formats)}: import or export one of them in the format of the other"
        )
    for part in () if problems else parts:
        assert kind is not None
        there, here = (trunk.digests(part, (kind,)).get(kind) for trunk in (theirs, ours))
        if there and here and there != here:
            problems.append(f"{WHAT[part]} (sha256 in {kind} {there[:12]} there, {here[:12]} here)")
    if not problems:
        return ""
    return f"{where} was made for another model: {'; '.join(problems)}; use adapters made on this very one"


def model_flags(model: ModelConfig) -> dict[str, Any]:
    """The fields FLAGS of a config."""
    return {name: getattr(model, name) for name in FLAGS}


def folder_trunk(opened: HubFolder) -> Trunk:
    """The trunk of an open Hub folder."""

    def tensors(is_part: IsPart) -> Named:
        for name in sorted(filter(is_part, opened.shapes)):
            yield name, opened.shapes[name], pieces_of(opened, name)

    return Trunk(model_flags(opened.model), KNOWN[precision(opened.dtype)], tensors)


def pieces_of(opened: HubFolder, name: str) -> Iterator[Tensor]:
    """The rows of a parameter, a few at a time."""
    rows, *rest = opened.shapes[name]
    step = max(1, PIECE // torch.Size(rest).numel())
    for start in range(0, rows, step):
        yield opened.rows(name, start, min(start + step, rows))
