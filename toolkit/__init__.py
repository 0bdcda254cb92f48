"""Policy losses for RL post-training: exact under any batch layout, in bounded head memory, picked by one override.

Names are loaded when first used, so that ``import toolkit`` costs nothing and initialises no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.errors import ConfigError, DataError, LaunchError, ToolkitError
    from toolkit.functional.registry import register_policy_loss
    from toolkit.functional.terms import PolicyTerms
    from toolkit.losses.base import BaseLossContext, BaseLossKwargs
    from toolkit.losses.ce import CELossContext, CELossKwargs
    from toolkit.losses.config import BaseLossConfig, CELossConfig, GRPOLossConfig
    from toolkit.losses.fields import PerToken, Shared
    from toolkit.losses.grpo import GRPOLossContext, GRPOLossKwargs
    from toolkit.losses.items import CELossContextInputItem, LossContextInputItem, RLLossContextInputItem
    from toolkit.runner import LossResult, LossRunner

__version__ = "0.1.0"

_HOMES = {
    "ToolkitError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "LaunchError": "errors",
    "register_policy_loss": "functional.registry",
    "PolicyTerms": "functional.terms",
    "BaseLossConfig": "losses.config",
    "CELossConfig": "losses.config",
    "GRPOLossConfig": "losses.config",
    "BaseLossContext": "losses.base",
    "BaseLossKwargs": "losses.base",
    "PerToken": "losses.fields",
    "Shared": "losses.fields",
    "LossContextInputItem": "losses.items",
    "CELossContextInputItem": "losses.items",
    "RLLossContextInputItem": "losses.items",
    "CELossContext": "losses.ce",
    "CELossKwargs": "losses.ce",
    "GRPOLossContext": "losses.grpo",
    "GRPOLossKwargs": "losses.grpo",
    "LossRunner": "runner",
    "LossResult": "runner",
}

__all__ = [
    "BaseLossConfig",
    "BaseLossContext",
    "BaseLossKwargs",
    "CELossConfig",
    "CELossContext",
    "CELossContextInputItem",
    "CELossKwargs",
    "ConfigError",
    "DataError",
    "GRPOLossConfig",
    "GRPOLossContext",
    "GRPOLossKwargs",
    "LaunchError",
    "LossContextInputItem",
    "LossResult",
    "LossRunner",
    "PerToken",
    "PolicyTerms",
    "RLLossContextInputItem",
    "Shared",
    "ToolkitError",
    "register_policy_loss",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"toolkit.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
