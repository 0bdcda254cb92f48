"""Registers our losses and estimators with verl; loads no loss before it is used."""

from __future__ import annotations

import functools

from toolkit.errors import ConfigError
from toolkit.functional.advantages.registry import advantage, advantage_names
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.integrations.verl.advantages import AVAILABLE, compute_advantage
from toolkit.integrations.verl.policy import compute_policy_loss
from toolkit.integrations.versions import check_version

TESTED = "0.9.1"
PREFIX = "toolkit"
"""The loss that the environment variable describes; ``toolkit/<name>`` is one by its name."""


def register() -> None:
    """Register ``toolkit``, every ``toolkit/<policy loss>`` and each estimator that needs only what verl gives.

    Raises:
        ConfigError: verl is not installed, or has no registry of losses.
    """
    check_version("verl", TESTED)
    try:
        from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, register_adv_est, register_policy_loss
    except ImportError as error:
        raise ConfigError(
            f"this verl has not the registries of {TESTED} ({error}); pip install verl=={TESTED}"
        ) from None
    register_policy_loss(PREFIX)(functools.partial(compute_policy_loss, None))
    for name in policy_loss_names():
        register_policy_loss(f"{PREFIX}/{name}")(functools.partial(compute_policy_loss, name))
    for name in advantage_names():
        key = f"{PREFIX}/{name}"
        if key not in ADV_ESTIMATOR_REGISTRY and {*advantage(name).needs} <= AVAILABLE:
            register_adv_est(key)(functools.partial(compute_advantage, name))
