"""Run by each rank of a launch: train_cases.py, with a model whose modules draw from all global generators.

Arguments: config files, trained one after the other.
"""

import os
import random
import sys
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from xlscale.config import load_config
from xlscale.config_sections import ModelConfig
from xlscale.models.heads import MaskedLM
from xlscale.models.parts import PLAIN, Parts
from xlscale.training import loop


def shake(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    """Noise of torch's generator, inside what activation checkpointing computes again."""
    return output * (0.5 + torch.rand_like(output)) if module.training else output


def scale(module: nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
    """Noise of numpy's and of Python's."""
    return output * (0.5 + np.random.rand()) * (0.5 + random.random()) if module.training else output


class Noisy(MaskedLM):
    """A masked LM as a user may have changed it."""

    def __init__(self, model: ModelConfig, parts: Parts = PLAIN):
        super().__init__(model, parts)
        self.encoder.embeddings.register_forward_hook(scale)
        for layer in self.encoder.layers:
            layer.mlp.register_forward_hook(shake)


if __name__ == "__main__":
    loop.build = partial(loop.build, model_class=Noisy)
    for path in sys.argv[1:]:
        torch.manual_seed(os.getpid())
        loop.train(load_config(path))
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
