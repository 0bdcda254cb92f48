"""The config of the model in ``training.reference_path``; no torch here."""

from __future__ import annotations

from typing import Any

from toolkit.errors import ConfigError
from toolkit.models.config import PretrainedConfig


def reference_config(path: str, dtype: Any = "float32") -> PretrainedConfig:
    """Return the checked config of a reference that is another model than the policy.

    Args:
        path: folder or hub id.
        dtype: of its weights.

    Raises:
        ConfigError: there is nothing to load.
    """
    try:
        config = PretrainedConfig(path=path, dtype=dtype)
        config.check()
    except ConfigError as error:
        raise ConfigError(str(error).replace("model.path", "training.reference_path")) from None
    return config
