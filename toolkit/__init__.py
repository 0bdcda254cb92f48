"""Policy losses for RL post-training: exact under any batch layout, in bounded head memory, chosen by one override.

Names are loaded when first used, so ``import toolkit`` is fast and initializes no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolkit.errors import ConfigError as ConfigError
    from toolkit.errors import DataError as DataError
    from toolkit.errors import LaunchError as LaunchError
    from toolkit.errors import ToolkitError as ToolkitError
    from toolkit.functional.advantages import register_advantage as register_advantage
    from toolkit.functional.policy.registry import register_policy_loss as register_policy_loss
    from toolkit.functional.terms import PolicyTerms as PolicyTerms
    from toolkit.losses.ce import CELossContext as CELossContext
    from toolkit.losses.ce import CELossKwargs as CELossKwargs
    from toolkit.losses.config.aggregation import AggregationConfig as AggregationConfig
    from toolkit.losses.config.base import BaseLossConfig as BaseLossConfig
    from toolkit.losses.config.ce import CELossConfig as CELossConfig
    from toolkit.losses.config.correction import CorrectionConfig as CorrectionConfig
    from toolkit.losses.config.logprob_spec import LogprobSpec as LogprobSpec
    from toolkit.losses.config.opd import OPDLossConfig as OPDLossConfig
    from toolkit.losses.config.oreal import OrealLossConfig as OrealLossConfig
    from toolkit.losses.config.policy import BaseRLLossConfig as BaseRLLossConfig
    from toolkit.losses.config.policy import GRPOLossConfig as GRPOLossConfig
    from toolkit.losses.config.term import LossTerm as LossTerm
    from toolkit.losses.context import BaseLossContext as BaseLossContext
    from toolkit.losses.grpo import GRPOLossContext as GRPOLossContext
    from toolkit.losses.grpo import GRPOLossKwargs as GRPOLossKwargs
    from toolkit.losses.items import CELossContextInputItem as CELossContextInputItem
    from toolkit.losses.items import LossContextInputItem as LossContextInputItem
    from toolkit.losses.items import RLLossContextInputItem as RLLossContextInputItem
    from toolkit.losses.kwargs import BaseLossKwargs as BaseLossKwargs
    from toolkit.losses.opd import OPDLossContext as OPDLossContext
    from toolkit.losses.oreal import OrealLossContext as OrealLossContext
    from toolkit.losses.record import PerToken as PerToken
    from toolkit.losses.record import Shared as Shared
    from toolkit.losses.scored import ScoredLossContext as ScoredLossContext
    from toolkit.losses.step.step import step_weights as step_weights
    from toolkit.runner import LossResult as LossResult
    from toolkit.runner import LossRunner as LossRunner

__version__ = "0.1.0"

_NAMES = {
    "errors": ("ToolkitError", "ConfigError", "DataError", "LaunchError"),
    "functional.policy.registry": ("register_policy_loss",),
    "functional.advantages": ("register_advantage",),
    "functional.terms": ("PolicyTerms",),
    "losses.config.base": ("BaseLossConfig",),
    "losses.config.ce": ("CELossConfig",),
    "losses.config.policy": ("BaseRLLossConfig", "GRPOLossConfig"),
    "losses.config.opd": ("OPDLossConfig",),
    "losses.config.oreal": ("OrealLossConfig",),
    "losses.config.aggregation": ("AggregationConfig",),
    "losses.config.correction": ("CorrectionConfig",),
    "losses.config.logprob_spec": ("LogprobSpec",),
    "losses.context": ("BaseLossContext",),
    "losses.kwargs": ("BaseLossKwargs",),
    "losses.record": ("PerToken", "Shared"),
    "losses.items": ("LossContextInputItem", "CELossContextInputItem", "RLLossContextInputItem"),
    "losses.ce": ("CELossContext", "CELossKwargs"),
    "losses.grpo": ("GRPOLossContext", "GRPOLossKwargs"),
    "losses.opd": ("OPDLossContext",),
    "losses.oreal": ("OrealLossContext",),
    "losses.config.term": ("LossTerm",),
    "losses.scored": ("ScoredLossContext",),
    "losses.step.step": ("step_weights",),
    "runner": ("LossRunner", "LossResult"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'toolkit' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"toolkit.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
