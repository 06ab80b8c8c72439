"""X-MOD's language adapters, and the routing of every sample to the adapter of its language.

Legend: B batch, T tokens, D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from xlscale.config_sections import ModelConfig
from xlscale.models.parts import Parts, activation


def language_of(parameter: str) -> str:
    """Language of an adapter's parameter, "" for any other."""
    _, found, rest = parameter.partition(".adapters.")
    return rest.partition(".")[0] if found else ""


class Routing(NamedTuple):
    """Which rows of a batch go to which language; made once per forward and used in every layer."""

    groups: list[tuple[str, int]]
    """(language, number of rows), each present language once, in the order of their ids."""
    order_B: Tensor | None
    """Rows in the order of the groups; None where they lie so already."""
    back_B: Tensor | None
    """Inverse of order_B."""


def route(lang_ids: Tensor | None, batch: int, model: ModelConfig, device: torch.device) -> Routing:
    """The routing of `batch` rows by their language ids [B], or all to the default language.

    An id is a position in model.languages; ValueError for one out of range (transformers would silently run no
    adapter), for another shape, and where neither ids nor a default language say what to run. Ids on the CPU cost
    no synchronisation with a GPU.
    """
    if lang_ids is None:
        if not model.default_language:
            raise ValueError(
                f"the language of the samples is not known; pass lang_ids [{batch}] or call set_default_language() "
                f"with one of {', '.join(model.languages)}"
            )
        return Routing([(model.default_language, batch)], None, None)
    if tuple(lang_ids.shape) != (batch,) or lang_ids.is_floating_point():
        found = f"{lang_ids.dtype} {tuple(lang_ids.shape)}"
        raise ValueError(f"lang_ids is {found}; give one integer for each of the {batch} samples")
    ids: list[int] = lang_ids.tolist()
    for language in ids:
        if not 0 <= language < len(model.languages):
            known = ", ".join(f"{number} {code}" for number, code in enumerate(model.languages))
            raise ValueError(f"lang_ids holds {language}, which has no adapter; use one of: {known}")
    groups = [(model.languages[language], ids.count(language)) for language in sorted(set(ids))]
    order = sorted(range(batch), key=ids.__getitem__)  # stable
    if order == list(range(batch)):
        return Routing(groups, None, None)
    back = sorted(range(batch), key=order.__getitem__)
    return Routing(groups, *(torch.tensor(rows).to(device, non_blocking=True) for rows in (order, back)))


class Adapter(nn.Module):
    """The bottleneck of one language: down, activation, up."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__()
        width = model.hidden_size // model.adapter_reduction_factor
        self.act, self.into_columns = activation(model.hidden_act), parts.into_columns
        self.down = parts.column(model.hidden_size, width)
        self.up = parts.row(width, model.hidden_size)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        output_BTD: Tensor = self.up(self.act(self.down(self.into_columns(hidden_BTD))))
        return output_BTD


class Adapters(nn.ModuleDict):
    """All adapters of one layer by their language."""

    def __init__(self, model: ModelConfig, parts: Parts):
        super().__init__({language: Adapter(model, parts) for language in model.languages})

    def forward(self, hidden_BTD: Tensor, routing: Routing) -> Tensor:
        """What each row's adapter makes of it [B, T, D]; the rows are sorted by language, so each adapter runs once."""
        if routing.order_B is not None:
            hidden_BTD = hidden_BTD.index_select(0, routing.order_B)
        parts = hidden_BTD.split([rows for _, rows in routing.groups])
        adapted = [self[language](part) for (language, _), part in zip(routing.groups, parts, strict=True)]
        adapted_BTD = adapted[0] if len(adapted) == 1 else torch.cat(adapted)
        return adapted_BTD if routing.back_B is None else adapted_BTD.index_select(0, routing.back_B)
