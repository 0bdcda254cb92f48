"""TRL's GRPO, RLOO and distillation trainers with any loss of this toolkit; needs trl (tested with 1.16.0).

from toolkit.integrations.trl import ToolkitGRPOTrainer
trainer = ToolkitGRPOTrainer(model, reward, args, train_dataset=data, loss="policy_loss=gspo kl=k3")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.integrations.trl.distillation import ToolkitDistillationTrainer as ToolkitDistillationTrainer
    from toolkit.integrations.trl.rloo import ToolkitRLOOTrainer as ToolkitRLOOTrainer
    from toolkit.integrations.trl.trainer import ToolkitGRPOTrainer as ToolkitGRPOTrainer
    from toolkit.integrations.trl.trainer import ToolkitLossMixin as ToolkitLossMixin

_MODULES = {
    "ToolkitDistillationTrainer": "distillation",
    "ToolkitGRPOTrainer": "trainer",
    "ToolkitLossMixin": "trainer",
    "ToolkitRLOOTrainer": "rloo",
}
__all__ = ["ToolkitDistillationTrainer", "ToolkitGRPOTrainer", "ToolkitLossMixin", "ToolkitRLOOTrainer"]
TESTED = "1.16.0"
"""The version of TRL that the tests ran with."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f'{name} needs TRL: pip install "rl-loss-toolkit[train]" trl=={TESTED}') from None
