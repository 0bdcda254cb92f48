"""Compose the config objects of the benchmark; does not import torch."""

from __future__ import annotations

from omegaconf import DictConfig

from toolkit.bench.config import BenchConfig
from toolkit.compose.build import build_loss, build_part
from toolkit.compose.tree import Root
from toolkit.errors import ConfigError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig

BENCH = Root(
    "bench",
    keys=("bench", "loss", "plugins", "rollout"),
    groups=("aggregation", "bench", "kl", "loss", "policy_loss"),
    schemas=(BenchConfig,),
)
NOT_IN_BENCH = ("temperature", "logit_scale", "softcap", "ignore_idx", "entropy_coef", "drop_zero_advantage")


def build_bench(cfg: DictConfig) -> tuple[BenchConfig, BaseLossConfig]:
    """Instantiate the config objects of a composed configuration.

    Raises:
        ConfigError: as in `build_config`; or the benchmark does not support the loss.
    """
    loss = build_loss(cfg)
    lacking = loss.not_in_training if isinstance(loss, BaseRLLossConfig) else None
    if lacking is not None:
        raise ConfigError(
            f"the loss reads {lacking} of the items, which the benchmark does not create; choose another policy loss, "
            "or a KL estimated from the sampled token"
        )
    for name, field in type(loss).model_fields.items():
        value = getattr(loss, name)
        if name in NOT_IN_BENCH and value != field.default:
            raise ConfigError(
                f"loss.{name}={value} is not in the benchmark, because some variants do not have it; leave "
                f"it at {field.default!r}" + ("; the cap of all variants is bench.softcap" if name == "softcap" else "")
            )
    return build_part(cfg, "bench", BenchConfig), loss
