"""Policy losses for RL post-training: exact under any batch layout, in bounded head memory, chosen by one override.

Names are loaded when first used, so ``import toolkit`` is fast and initializes no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.errors import ConfigError, DataError, LaunchError, ToolkitError
    from toolkit.functional.advantages import register_advantage
    from toolkit.functional.policy.registry import register_policy_loss
    from toolkit.functional.terms import PolicyTerms
    from toolkit.losses.ce import CELossContext, CELossKwargs
    from toolkit.losses.config.aggregation import AggregationConfig
    from toolkit.losses.config.base import BaseLossConfig
    from toolkit.losses.config.ce import CELossConfig
    from toolkit.losses.config.correction import CorrectionConfig
    from toolkit.losses.config.logprob_spec import LogprobSpec
    from toolkit.losses.config.opd import OPDLossConfig
    from toolkit.losses.config.oreal import OrealLossConfig
    from toolkit.losses.config.policy import BaseRLLossConfig, GRPOLossConfig
    from toolkit.losses.config.term import LossTerm
    from toolkit.losses.context import BaseLossContext
    from toolkit.losses.grpo import GRPOLossContext, GRPOLossKwargs
    from toolkit.losses.items import CELossContextInputItem, LossContextInputItem, RLLossContextInputItem
    from toolkit.losses.kwargs import BaseLossKwargs
    from toolkit.losses.opd import OPDLossContext
    from toolkit.losses.oreal import OrealLossContext
    from toolkit.losses.record import PerToken, Shared
    from toolkit.losses.scored import ScoredLossContext
    from toolkit.losses.step.step import step_weights
    from toolkit.runner import LossResult, LossRunner

__version__ = "0.1.0"

_MODULES = {
    "ToolkitError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "LaunchError": "errors",
    "register_policy_loss": "functional.policy.registry",
    "register_advantage": "functional.advantages",
    "PolicyTerms": "functional.terms",
    "BaseLossConfig": "losses.config.base",
    "CELossConfig": "losses.config.ce",
    "BaseRLLossConfig": "losses.config.policy",
    "GRPOLossConfig": "losses.config.policy",
    "OPDLossConfig": "losses.config.opd",
    "OrealLossConfig": "losses.config.oreal",
    "AggregationConfig": "losses.config.aggregation",
    "CorrectionConfig": "losses.config.correction",
    "LogprobSpec": "losses.config.logprob_spec",
    "BaseLossContext": "losses.context",
    "BaseLossKwargs": "losses.kwargs",
    "PerToken": "losses.record",
    "Shared": "losses.record",
    "LossContextInputItem": "losses.items",
    "CELossContextInputItem": "losses.items",
    "RLLossContextInputItem": "losses.items",
    "CELossContext": "losses.ce",
    "CELossKwargs": "losses.ce",
    "GRPOLossContext": "losses.grpo",
    "GRPOLossKwargs": "losses.grpo",
    "OPDLossContext": "losses.opd",
    "OrealLossContext": "losses.oreal",
    "LossTerm": "losses.config.term",
    "ScoredLossContext": "losses.scored",
    "step_weights": "losses.step.step",
    "LossRunner": "runner",
    "LossResult": "runner",
}

__all__ = [
    "AggregationConfig",
    "BaseLossConfig",
    "BaseLossContext",
    "BaseLossKwargs",
    "BaseRLLossConfig",
    "CELossConfig",
    "CELossContext",
    "CELossContextInputItem",
    "CELossKwargs",
    "ConfigError",
    "CorrectionConfig",
    "DataError",
    "GRPOLossConfig",
    "GRPOLossContext",
    "GRPOLossKwargs",
    "LaunchError",
    "LogprobSpec",
    "LossContextInputItem",
    "LossResult",
    "LossRunner",
    "LossTerm",
    "OPDLossConfig",
    "OPDLossContext",
    "OrealLossConfig",
    "OrealLossContext",
    "PerToken",
    "PolicyTerms",
    "RLLossContextInputItem",
    "ScoredLossContext",
    "Shared",
    "ToolkitError",
    "register_advantage",
    "register_policy_loss",
    "step_weights",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"toolkit.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
