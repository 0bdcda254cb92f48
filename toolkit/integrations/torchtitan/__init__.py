"""A loss for torchtitan's RL trainer with any policy loss of this toolkit; tested with torchtitan 0.3.0.

from toolkit.integrations.torchtitan import ToolkitLoss
trainer = PolicyTrainer.Config(loss=ToolkitLoss.Config(loss="policy_loss=cispo policy_loss.weight_max=5"))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.integrations.torchtitan.loss import ToolkitLoss as ToolkitLoss

TESTED = "0.3.0"
"""The version of torchtitan that the tests ran with."""
__all__ = ["ToolkitLoss"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.loss"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torchtitan":
            raise
        raise ImportError(f"{name} needs torchtitan: pip install torchtitan=={TESTED}") from None
