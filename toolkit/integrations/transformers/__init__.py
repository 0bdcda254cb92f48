"""Hugging Face's Trainer with a loss of this toolkit; tested with transformers 5.23.

from toolkit.integrations.transformers import ToolkitTrainer, make_compute_loss_func
ToolkitTrainer(model, args, train_dataset=data, loss="loss=ce")  # every loss and mean, without the logits
Trainer(model, args, train_dataset=data, compute_loss_func=make_compute_loss_func("loss=ce"))  # means over tokens
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.integrations.transformers.function import make_compute_loss_func as make_compute_loss_func
    from toolkit.integrations.transformers.trainer import ToolkitTrainer as ToolkitTrainer
    from toolkit.integrations.transformers.trainer import ToolkitTrainerMixin as ToolkitTrainerMixin

TESTED = "5.23.0"
"""The version of transformers that the tests ran with."""
_MODULES = {"make_compute_loss_func": "function", "ToolkitTrainer": "trainer", "ToolkitTrainerMixin": "trainer"}
__all__ = ["ToolkitTrainer", "ToolkitTrainerMixin", "make_compute_loss_func"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f'{name} needs transformers: pip install "rl-loss-toolkit[train]"') from None
