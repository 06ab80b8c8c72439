"""The only importer of deepspeed and fairscale: process groups, tensor parallelism, the ZeRO engine."""

import os

import torch

# DeepSpeed picks its accelerator at import: without a GPU it must be told, or it looks for one.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
