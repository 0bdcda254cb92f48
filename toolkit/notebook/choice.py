"""Which loss the explorer shows, and the overrides and the Python line that select the same. No widgets here."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from toolkit.compose.schemas import conf_dir
from toolkit.errors import ConfigError
from toolkit.functional.policy.registry import PolicyLoss, policy_loss
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.peers.python_form import in_python

KL_COEF = 0.001
"""Default of ``kl_loss_coef``."""


@dataclass(frozen=True)
class LossChoice:
    """A policy loss with its options, a KL term and an aggregation."""

    name: str = "vanilla"
    """A registered policy loss."""
    changed: Mapping[str, Any] = field(default_factory=dict)
    """Options of the policy loss; those that are not here have their defaults."""
    kl: str | None = None
    """k1, abs, k2 or k3; None: no KL term."""
    kl_gradient: str = "as_is"
    kl_coef: float = KL_COEF
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)

    @classmethod
    def of(cls, cfg: Any) -> LossChoice:
        """Return what a config of a policy loss chooses.

        Raises:
            ConfigError: the loss is not built on a policy loss.
        """
        if not isinstance(cfg, BaseRLLossConfig):
            raise ConfigError(
                f"{type(cfg).__name__} is not built on a policy loss, so there is no ratio to draw it over; give a "
                "runner of GRPOLossConfig, or none"
            )
        from toolkit.functional.kl_facts import KL_NAMES

        kl = KL_NAMES.get(str(cfg.kl_loss_type)) if cfg.use_kl_loss else None
        return cls(
            name=cfg.policy.name,
            changed=dict(cfg.policy_options),
            kl=kl,
            kl_gradient=cfg.kl_gradient if kl else "as_is",
            kl_coef=cfg.kl_loss_coef if kl else KL_COEF,
            aggregation=cfg.aggregation,
        )

    @property
    def loss(self) -> PolicyLoss:
        """The policy loss."""
        return policy_loss(self.name)

    @cached_property
    def options(self) -> dict[str, Any]:
        """All its options.

        Raises:
            ConfigError: an option is unknown, of the wrong type or out of range.
        """
        return self.loss.options(self.changed)

    def with_option(self, name: str, value: Any) -> LossChoice:
        """Return this choice with another value of an option."""
        return replace(self, changed={**self.changed, name: value})

    @property
    def differing(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        defaults = {name: each.default for name, each in self.loss.options_model.model_fields.items()}
        return {name: value for name, value in self.options.items() if value != defaults[name]}

    @property
    def label(self) -> str:
        """A short name for a legend: the loss and the options that differ."""
        pairs = ", ".join(f"{name}={_written(value)}" for name, value in self.differing.items())
        return f"{self.name} ({pairs})" if pairs else self.name

    def overrides(self) -> list[str]:
        """Return the overrides of the command line that select this."""
        chosen = [f"policy_loss={self.name}"]
        chosen += [f"policy_loss.{name}={_written(value)}" for name, value in self.differing.items()]
        if self.kl is not None:
            file = f"{self.kl}_{self.kl_gradient}"
            has_file = (Path(conf_dir()) / "kl" / f"{file}.yaml").is_file()
            chosen.append(f"kl={file if has_file else self.kl}")
            if self.kl_gradient != "as_is" and not has_file:
                chosen.append(f"loss.kl_gradient={self.kl_gradient}")
            if self.kl_coef != KL_COEF:
                chosen.append(f"loss.kl_loss_coef={_written(self.kl_coef)}")
        default = AggregationConfig()
        if self.aggregation.name != default.name:
            chosen.append(f"aggregation={self.aggregation.name}")
        for name, value in self.aggregation.model_dump().items():
            if name != "name" and value != getattr(default, name):
                chosen.append(f"loss.aggregation.{name}={_written(value)}")
        return chosen

    def command_line(self) -> str:
        """Return the overrides as they are typed, with a reminder where the loss is of a file of the user's."""
        text = shlex.join(self.overrides())
        has_file = (Path(conf_dir()) / "policy_loss" / f"{self.name}.yaml").is_file()
        return text if has_file else f"plugins=[your_file.py] {text}"

    def python(self) -> str:
        """Return the line of Python that makes a runner of it."""
        return f"runner = LossRunner(GRPOLossConfig({in_python(' '.join(self.overrides()))}))"


def _written(value: Any) -> str:
    """Return a value as Hydra reads it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(round(value, 12)) if isinstance(value, float) else str(value)
