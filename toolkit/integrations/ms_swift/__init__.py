"""ms-swift's GRPO with any loss of this toolkit; tested with ms-swift 4.6.0.

# my_loss.py, for: swift rlhf --rlhf_type grpo --external_plugins my_loss.py ...
from toolkit.integrations.ms_swift import register
register("policy_loss=cispo policy_loss.weight_max=5")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from toolkit.errors import ConfigError, warn_once
from toolkit.integrations.chosen import check_loss
from toolkit.integrations.ms_swift.args import MS_SWIFT
from toolkit.integrations.versions import check_version

if TYPE_CHECKING:
    from toolkit.integrations.ms_swift.config import ToolkitGRPOConfig as ToolkitGRPOConfig
    from toolkit.integrations.ms_swift.trainer import ToolkitGRPOTrainer as ToolkitGRPOTrainer

__all__ = ["ToolkitGRPOConfig", "ToolkitGRPOTrainer", "register"]
TESTED = "4.6.0"
"""The version of ms-swift that the tests ran with."""
_registered: list[Any] = []
"""What `register` was last called with."""


def register(loss: Any) -> None:
    """Let ``swift rlhf --rlhf_type grpo`` train with a loss of this toolkit; call it in a file of --external_plugins.

    Args:
        loss: overrides as on the command line, in one string or a list, ``"policy_loss=gspo kl=k3"``; or a
            ``GRPOLossConfig``.

    Raises:
        ConfigError: there is no such loss; or ms-swift is not installed, or has no table of trainers.
    """
    check_version("ms-swift", TESTED)
    try:
        from swift.trainers import TrainerFactory
    except ImportError as error:
        raise ConfigError(f"this ms-swift has no table of trainers ({error}); install {TESTED}") from None
    check_loss(loss, MS_SWIFT)
    if _registered and _registered[0] != loss:
        warn_once(f"register was called with {_registered[0]!r} before; {loss!r} takes its place")
    TrainerFactory.TRAINER_MAPPING["grpo"] = f"{__name__}.ToolkitGRPOTrainer"
    TrainerFactory.TRAINING_ARGS_MAPPING["grpo"] = f"{__name__}.ToolkitGRPOConfig"
    _registered[:] = [loss]


def registered() -> Any:
    """Return the loss that `register` was called with.

    Raises:
        ConfigError: it was not called.
    """
    if not _registered:
        raise ConfigError("ToolkitGRPOTrainer has no loss; call toolkit.integrations.ms_swift.register(loss) first")
    return _registered[0]


def __getattr__(name: str) -> Any:
    modules = {"ToolkitGRPOTrainer": "trainer", "ToolkitGRPOConfig": "config"}
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{modules[name]}"), name)
