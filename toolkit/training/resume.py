"""The same command again: ``training.resume=auto``, and restarts by torchrun (``--max-restarts``). No torch here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError
from toolkit.training.config import AUTO, TrainingConfig
from toolkit.training.saved import all_in

RESULTS = ("model", "summary.json")
"""What a run leaves after its last checkpoint: where one of them is, but no checkpoint, something was removed."""


def continued(config: TrainingConfig, folder: str) -> TrainingConfig:
    """Return the settings of a run that continues what its output directory holds, if it was asked to.

    Without a checkpoint there it starts anew, in place of a run that ended before its first one. Other runs: unchanged.
    """
    if config.resume != AUTO and not is_restart():
        return config
    earlier = None if config.resume == AUTO else config.resume
    if all_in(Path(folder)):
        return config.model_copy(update={"resume": folder})
    is_finished = any((Path(folder) / name).exists() for name in RESULTS)
    changes: dict[str, Any] = {"resume": earlier, "overwrite": config.overwrite or not is_finished}
    return config.model_copy(update=changes)


def check_named(config: TrainingConfig, setting: str = "hydra.run.dir") -> str | None:
    """Return a note for a run whose output directory is new each time, so nothing can be continued; None: none.

    Raises:
        ConfigError: it should continue what is there.
    """
    remedy = f"name it, e.g. {setting}=runs/mine"
    if config.resume == AUTO:
        raise ConfigError(
            "training.resume=auto continues the run in its output directory, but without a name that is a new one each "
            f"time; {remedy}"
        )
    if is_restart():
        return f"torchrun has started the run again, but its output directory is a new one, so it starts anew; {remedy}"
    if _number("TORCHELASTIC_MAX_RESTARTS") > 0:
        return f"a restart by torchrun would start anew, because the output directory is a new one each time; {remedy}"
    return None


def is_restart() -> bool:
    """Whether torchrun has started this command before."""
    return _number("TORCHELASTIC_RESTART_COUNT") > 0


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdigit() else 0
