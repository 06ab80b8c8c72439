"""A folder of somebody's weights and config, read by our parameter names, rows of a tensor at a time.

It may be one of transformers (safetensors or pickles, in one file or several) or fairseq's model.pt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xlscale.checkpoint.fairseq import DECODER, WORD, Place, canonical, fairseq_config, is_fairseq, places
from xlscale.checkpoint.hub_config import read_head, read_hub_config
from xlscale.checkpoint.hub_names import BUFFERS, SECOND_NAMES, Shapes, compare_shapes, hf_names, shapes_of, with_prefix
from xlscale.checkpoint.weights import CHUNK, FAIRSEQ, Weights, check_finite, open_weights
from xlscale.config import FIELDS
from xlscale.config_rules import broken_rules
from xlscale.config_sections import ModelConfig
from xlscale.config_values import nearest
from xlscale.models.heads import HEADS
from xlscale.models.init import initial_rows

CONFIG = "config.json"
POOLER = ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias")
# Modules outside the encoder that mean the same in all heads that have them.
SHARED = ("head.", "pooler.")


@dataclass(frozen=True)
class HubFolder:
    """An open folder: names and shapes are checked, values are when they are read."""

    where: Path
    model: ModelConfig
    head: str
    """A key of HEADS."""
    shapes: Shapes
    """Our name -> shape of every parameter of the model with that head."""
    new: list[str]
    """Parameters of a head that the folder has not; they are drawn from `seed`."""
    seed: int
    weights: Weights
    places: dict[str, Place]

    @property
    def dtype(self) -> torch.dtype:
        """That of all tensors; fp32 where they differ."""
        found = {self.weights.dtype(place.name) for place in self.places.values()}
        return found.pop() if len(found) == 1 else torch.float32

    @property
    def is_mapped(self) -> bool:
        """Whether rows are read from the disk; an old pickle is wholly in memory."""
        return all(file.is_mapped for file in self.weights.files)

    def news(self) -> str:
        """What is not the folder's, in words; "" when all is."""
        return f"{self.where} has no {', '.join(self.new)}: drawn from seed {self.seed}" if self.new else ""

    def with_languages(self, languages: Sequence[str]) -> "HubFolder":
        """The same with the adapters of some of its languages only, whose ids are their places in `languages`.

        A default language that is not among them is dropped. ValueError for a language that the folder has not.
        """
        if not self.model.languages:
            raise ValueError(f"{self.where} is of type {self.model.model_type}, which has no languages to choose from")
        for language in languages:
            if language not in self.model.languages:
                raise ValueError(f"{self.where} has no adapters of {language}{nearest(language, self.model.languages)}")
        default = self.model.default_language if self.model.default_language in languages else ""
        model = with_changes(self.model, {"languages": list(languages), "default_language": default})
        wanted = shapes_of(model, self.head, pooler="pooler.dense.weight" in self.shapes)
        places = {name: place for name, place in self.places.items() if name in wanted}
        return replace(self, model=model, shapes=wanted, places=places)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a parameter along dimension 0, in the file's dtype; ValueError for a value that is not finite."""
        if name not in self.places:
            return initial_rows(name, self.shapes[name], self.model, self.seed, start, stop)
        place = self.places[name]
        first = self.shapes[name][0] * place.part
        found = self.weights.rows(place.name, first + start, first + stop)
        check_finite(f"{self.where}: {name}", found)
        return found

    def read(self, name: str) -> Tensor:
        """A whole parameter."""
        return self.rows(name, 0, self.shapes[name][0])


def open_hub_folder(
    where: str | Path, head: str | None = None, seed: int = 0, unsafe: bool = False, **changes: Any
) -> HubFolder:
    """Open a model's folder, or a weights file in it, for the head that its config.json names, or another.

    head: a key of HEADS. Of another head than the folder's the folder has no weights: what they share is read, the rest
    is drawn from `seed`. unsafe: pickles may run code. changes: fields of ModelConfig that shall differ, such as
    num_labels. ValueError, in one line, for whatever is missing, unexpected, damaged, of a wrong shape, not tied, or
    not honoured.
    """
    where = Path(where)
    folder = where.parent if where.is_file() else where
    if not folder.is_dir():
        raise ValueError(f"{where} is not a folder; give one with {CONFIG} and weights")
    if head is not None and head not in HEADS:
        raise ValueError(f"head={head!r} is not known; use one of {', '.join(HEADS)}")
    configured = (folder / CONFIG).is_file() or not (where.is_file() or (where / FAIRSEQ).is_file())
    if configured:
        model, own = read_hub_config(folder / CONFIG), read_head(folder / CONFIG)
        weights = open_weights(where, unsafe)
    else:
        weights = open_weights(where, unsafe)
        if not is_fairseq(weights):
            raise ValueError(f"{folder / CONFIG} does not exist; {where.name} needs it beside it")
        model, own = fairseq_config(weights), None
    if is_fairseq(weights):
        own = "ForMaskedLM"
    own = own or head
    if own is None or own not in HEADS:
        names = ", ".join(HEADS)
        raise ValueError(f"{folder / CONFIG}: architectures says {own}, no head of ours; give head= as one of {names}")
    model = with_changes(model, changes)
    if model.num_hidden_layers > len(weights.held):  # before a hostile config makes as many names
        raise ValueError(f"{where} has {len(weights.held)} tensors, too few for {model.num_hidden_layers} layers")
    if is_fairseq(weights):
        return _open_fairseq(where, model, head or own, own, seed, weights)
    return _open_transformers(where, model, head or own, own, seed, weights)


def read_hub_folder(folder: str | Path, head: str | None = None) -> tuple[ModelConfig, Shapes, Callable[[str], Tensor]]:
    """The config, our name -> shape, and a reader of a parameter by our name; all else as open_hub_folder."""
    found = open_hub_folder(folder, head)
    return found.model, found.shapes, found.read


def with_changes(model: ModelConfig, changes: dict[str, Any]) -> ModelConfig:
    """The config with some fields changed; ValueError for an unknown field and for values that break a rule."""
    unknown = [name for name in changes if f"model.{name}" not in FIELDS]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a field of a model's config; see ModelConfig")
    if "num_labels" in changes:
        changes = {"id2label": {}} | changes
    changed = replace(model, **changes)
    problems = [line for _, line in broken_rules({f"model.{name}": value for name, value in vars(changed).items()})]
    if problems:
        raise ValueError("; ".join(problems))
    return changed


def _open_transformers(where: Path, model: ModelConfig, head: str, own: str, seed: int, weights: Weights) -> HubFolder:
    held: dict[str, str] = {}
    for name in weights.held:
        if held.setdefault(with_prefix(name), name) != name:
            raise ValueError(f"{where} holds both {name} and {held[with_prefix(name)]}; remove one of them")
    pooler = any(name in held for name in POOLER)
    names = {ours: with_prefix(theirs) for ours, theirs in hf_names(model, head, pooler).items()}
    known = {*BUFFERS, *SECOND_NAMES.values(), *POOLER}
    for theirs, second in SECOND_NAMES.items():
        if second not in held or theirs in held:
            _check_tied(weights, held.get(theirs), held.get(second))
        elif theirs in names.values():
            held[theirs] = held.pop(second)
    if head != own:  # of another head nothing is used but what both have
        known |= {name for name in held if not name.startswith("roberta.")}
    found = {
        ours: Place(held[theirs])
        for ours, theirs in names.items()
        if theirs in held and (head == own or ours.startswith(("encoder.", *SHARED)))
    }
    used = {place.name for place in found.values()}
    strangers = [held[name] for name in held if held[name] not in used and name not in known]
    return _checked(where, model, head, own, seed, weights, found, strangers, pooler)


def _open_fairseq(where: Path, model: ModelConfig, head: str, own: str, seed: int, weights: Weights) -> HubFolder:
    held = canonical(weights)
    _check_tied(weights, held.get(WORD), held.get(DECODER))
    everything = places(list(shapes_of(model, own)), weights)
    shapes = shapes_of(model, head, pooler=False)
    found = {ours: place for ours, place in everything.items() if ours in shapes}
    used = {place.name for place in everything.values()}
    strangers = [name for plain, name in held.items() if name not in used and plain != DECODER]
    return _checked(where, model, head, own, seed, weights, found, strangers, pooler=False)


def _checked(
    where: Path,
    model: ModelConfig,
    head: str,
    own: str,
    seed: int,
    weights: Weights,
    found: dict[str, Place],
    strangers: list[str],
    pooler: bool,
) -> HubFolder:
    """The open folder, after a look at all names, shapes and dtypes."""
    shapes = shapes_of(model, head, pooler)
    new = [name for name in shapes if name not in found and head != own and not name.startswith("encoder.")]
    if is_fairseq(weights) and model.type_vocab_size == 1:
        wanted = {name: shape for name, shape in shapes.items() if "token_type" not in name}  # zeros
    else:
        wanted = shapes
    there: Shapes = {}
    for ours, place in found.items():
        first, *others = weights.shape(place.name) or (0,)
        there[ours] = (first // place.parts if first % place.parts == 0 else first, *others)
    there |= {name: weights.shape(name) for name in strangers}
    compare_shapes(there, {name: shape for name, shape in wanted.items() if name not in new}, f"in {where}")
    for place in found.values():
        weights.dtype(place.name)
    return HubFolder(where, model, head, shapes, new, seed, weights, found)


def _check_tied(weights: Weights, first: str | None, second: str | None) -> None:
    """ValueError when both are there and are not the same."""
    if first is None or second is None or first == second:
        return
    shape = weights.shape(first)
    same = len(shape) > 0 and shape == weights.shape(second) and weights.dtype(first) == weights.dtype(second)
    step = max(1, CHUNK // max(1, torch.Size(shape[1:]).numel()))
    for start in range(0, shape[0] if same else 0, step):
        stop = min(start + step, shape[0])
        same = same and torch.equal(weights.rows(first, start, stop), weights.rows(second, start, stop))
    if not same:
        raise ValueError(
            f"{weights.where}: {second} differs from {first}; only tied weights can be read, tie them first"
        )
