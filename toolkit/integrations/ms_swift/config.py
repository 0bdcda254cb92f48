"""ms-swift's arguments of GRPO, checked beside the loss before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from swift.rlhf_trainers import GRPOConfig

from toolkit.integrations.chosen import chosen_config
from toolkit.integrations.ms_swift import registered
from toolkit.integrations.ms_swift.args import MS_SWIFT, check_args


@dataclass
class ToolkitGRPOConfig(GRPOConfig):
    """ms-swift's ``GRPOConfig``; raises `ConfigError` where it contradicts the loss that `register` was called with."""

    def __post_init__(self) -> None:
        super().__post_init__()
        loss = registered()
        check_args(self, chosen_config(loss, self, MS_SWIFT), loss)
