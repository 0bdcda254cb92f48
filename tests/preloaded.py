"""What the process that others are forked from has loaded: all that is slow, none of the command lines."""

import contextlib
import importlib

import torch

torch.set_num_threads(1)

for name in (
    "accelerate",
    "hydra",
    "hypothesis",
    "matplotlib.pyplot",
    "pytest",
    "reasoning_gym",
    "rich.table",
    "safetensors.torch",
    "tokenizers",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "toolkit.compose.tree",
    "toolkit.check.suite",
    "toolkit.runner",
    "toolkit.testing",
    "toolkit.training.run",
):
    with contextlib.suppress(ImportError):  # an extra that is not installed
        importlib.import_module(name)

importlib.import_module("toolkit.losses.scored").SMALL_LOGITS = 0  # as in tests.conftest
with contextlib.suppress(ImportError):
    importlib.import_module("toolkit.testing.processes").START_METHOD = "forkserver"
