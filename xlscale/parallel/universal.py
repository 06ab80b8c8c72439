"""The engine's universal layout: what its files hold, and what ds_to_universal must be told of our parameters.

Without the latter it doubles LayerNorms and says nothing. It takes regular expressions, each for one kind of parameter:
here one per parameter with its numbers left open, as made by TP_PLAN.
"""

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
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


def universal_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Shape in which the layout holds a whole parameter.

    The engine fills up a vocabulary of two dimensions by itself; one of one dimension must bring what `tp` ranks need.
    """
    if len(shape) == 1 and plan_class(name)[0] == VOCABULARY:
        return (rows_per_rank(shape[0], tp) * tp,)
    return shape


def universal_entry(name: str, whole: torch.Tensor) -> dict[str, Any]:
    """What zero/<name>/fp32.pt holds, and those of the moments: the tensor, and how it is cut again."""
    entry: dict[str, Any] = {constants.PARAM: whole}
    dim = split_dim(name)
    if dim is not None:
        entry[constants.CAT_DIM] = dim
    if plan_class(name) == (VOCABULARY, "weight"):
        entry[constants.VOCAB_TENSOR] = True
    return entry


def universal_optimizer_state(groups: list[dict[str, Any]], steps: int) -> dict[str, Any]:
    """What zero/optimizer_state.pt holds; `groups`: hyper-parameters of the optimizer's, in its order.

    The engine takes all groups from it below ZeRO-3, where the step stands beside each parameter; under ZeRO-3 it takes
    the step from here, and gives every group the hyper-parameters of the first.
    """
    numbered = [group | {"params": [number]} for number, group in enumerate(groups)]
    step = torch.tensor(float(steps))
    return {
        constants.DS_VERSION: deepspeed.__version__,
        constants.PARAM_GROUPS: numbered,
        constants.OPTIMIZER_STATE_DICT: {
            "state": {number: {"step": step} for number in range(len(groups))},
            constants.PARAM_GROUPS: numbered,
        },
    }


def universal_model_states(
    shapes: Mapping[str, tuple[int, ...]], vocab_size: int, tp: int, step: int, skipped: int, samples: int
) -> dict[str, Any]:
    """What *_model_states.pt of the layout holds: counts and names; the weights are in zero/."""
    return {
        "module": {},
        "buffer_names": [],
        "optimizer": None,
        constants.PARAM_SHAPES: [OrderedDict((name, torch.Size(shape)) for name, shape in shapes.items())],
        constants.FROZEN_PARAM_SHAPES: None,
        constants.FROZEN_PARAM_FRAGMENTS: None,
        "shared_params": {},
        "lr_scheduler": None,
        "data_sampler": None,
        "random_ltd": None,
        "skipped_steps": skipped,
        "global_steps": step,
        "global_samples": samples,
        "dp_world_size": 1,
        "mp_world_size": 1,
        constants.CHECKPOINT_PARALLEL_DIMS: {constants.CHECKPOINT_PP_DEGREE: 1, constants.CHECKPOINT_TP_DEGREE: 1},
        "ds_config": {},
        constants.DS_VERSION: deepspeed.__version__,
        constants.UNIVERSAL_CHECKPOINT_INFO: universal_checkpoint_info(shapes, vocab_size, tp),
    }


def _pattern(name: str) -> str:
    """Matches `name` and the same parameter of the other layers, and nothing else."""
    return "^" + r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")) + "$"
