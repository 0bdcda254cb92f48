"""Launchers and sweepers of Hydra that come with the extra [sweep]."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from hydra.core.override_parser.types import Override

from toolkit.errors import ConfigError, did_you_mean, listed

PLUGINS = {
    "hydra/launcher": {
        "joblib": "hydra_joblib_launcher",
        "submitit_local": "hydra_submitit_launcher",
        "submitit_slurm": "hydra_submitit_launcher",
    },
    "hydra/sweeper": {"optuna": "hydra_optuna_sweeper"},
}
"""Choices of Hydra, and the plugin that each needs."""


def check_sweepers(parsed: Iterable[Override]) -> None:
    """Raise `ConfigError` if a launcher or sweeper is not installed or does not exist."""
    for override in parsed:
        key = override.key_or_group
        value = override.value()
        if key not in PLUGINS or not isinstance(value, str) or value == "basic":
            continue
        plugin = PLUGINS[key].get(value)
        if plugin is not None and not _is_there(plugin):
            raise ConfigError(f'{key}={value} is a plugin of Hydra: pip install "rl-loss-toolkit[sweep]"')
        if plugin is None and did_you_mean(value, PLUGINS[key]):
            known = listed(["basic", *PLUGINS[key]])
            raise ConfigError(f"{key}={value} is not a choice{did_you_mean(value, PLUGINS[key])}; choose {known}")


def _is_there(plugin: str) -> bool:
    try:
        return importlib.util.find_spec(f"hydra_plugins.{plugin}") is not None
    except ModuleNotFoundError:  # no plugin at all
        return False
