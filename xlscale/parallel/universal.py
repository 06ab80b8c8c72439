"""What deepspeed's ds_to_universal must be told of our parameters; without it, it doubles LayerNorms and says nothing.

It takes regular expressions, each for one kind of parameter: here one per parameter with its numbers left open, as made
by TP_PLAN.
"""

import re
from collections.abc import Iterable
from typing import Any

from deepspeed.checkpoint import constants

from xlscale.parallel.tensor_parallel import VOCABULARY, plan_class, split_dim
from xlscale.parallel.vocabulary import rows_per_rank


def universal_checkpoint_info(names: Iterable[str], vocab_size: int, tp: int) -> dict[str, Any]:
    """The entry `universal_checkpoint_info` of an engine's checkpoint of the parameters `names` at `tp` slices each.

    What is in no list is merged along dimension 0. A vocabulary's bias is there too, with its padding at the end: the
    engine can strip only what has two dimensions.
    """
    replicated: dict[str, None] = {}
    row: dict[str, None] = {}
    vocabulary: dict[str, None] = {}
    for name in names:
        dim = split_dim(name)
        if dim is None:
            replicated[_pattern(name)] = None
        elif dim == 1:
            row[_pattern(name)] = None
        elif plan_class(name) == (VOCABULARY, "weight"):
            vocabulary[_pattern(name)] = None
    return {
        constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE,
        constants.ORIGINAL_VOCAB_SIZE: vocab_size,
        constants.PADDED_VOCAB_SIZE: rows_per_rank(vocab_size, tp) * tp,
        constants.TP_REPLICATED_PARAMETER_PATTERNS: list(replicated),
        constants.PARAMETER_WITH_ROW_PARALLELISM_PATTERNS: list(row),
        constants.VOCABULARY_PARAMETER_PATTERNS: list(vocabulary),
    }


def _pattern(name: str) -> str:
    """Matches `name` and the same parameter of the other layers, and nothing else."""
    return "^" + r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")) + "$"
