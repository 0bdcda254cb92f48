"""Our losses in XTuner v1, two ways; written from its source of October 2026.

A policy loss by name, in XTuner's config: ``GRPOLossConfig(policy_loss_cfg=dict(loss_type=
"toolkit.integrations.xtuner.gspo", cliprange_low=3e-4, cliprange_high=4e-4))``. Every registered policy loss is a
function of this module.

The whole loss, with our head, means and metrics: ``from toolkit.integrations.xtuner import ToolkitLossConfig``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.errors import did_you_mean
from toolkit.functional.policy.registry import policy_loss_names

if TYPE_CHECKING:
    from toolkit.integrations.xtuner.classes import ToolkitLossConfig as ToolkitLossConfig
    from toolkit.integrations.xtuner.classes import ToolkitLossContext as ToolkitLossContext

CLASSES = ("ToolkitLossConfig", "ToolkitLossContext")


def __getattr__(name: str) -> Any:
    if name in CLASSES:
        try:
            return getattr(importlib.import_module(f"{__name__}.classes"), name)
        except ImportError as error:
            if error.name is None or error.name.partition(".")[0] != "xtuner":
                raise
            raise ImportError(f"{name} needs XTuner v1 with xtuner.v1.rl.loss, as of October 2026 ({error})") from None
    names = () if name.startswith("_") else policy_loss_names()
    if name not in names:
        raise AttributeError(
            f"module {__name__!r} has no policy loss {name!r}{did_you_mean(name, names)}" if names else name
        )
    from toolkit.integrations.xtuner.functions import policy_loss_fn

    return policy_loss_fn(name)


def __dir__() -> list[str]:
    return sorted([*CLASSES, *policy_loss_names()])
