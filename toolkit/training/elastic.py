"""Restarts by torchrun (``--max-restarts``): the same command again, which then continues its run; no torch here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from toolkit.training.config import TrainingConfig
from toolkit.training.startup import CHECKPOINT


def restarted(config: TrainingConfig, folder: str) -> TrainingConfig:
    """Return the settings of a run that torchrun has started again: they continue what is in the output directory.

    Without a checkpoint there it starts anew. The first start and other launchers: unchanged.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if not count.isdigit() or int(count) == 0:
        return config
    saved = (Path(folder, name, "state.json") for name in (CHECKPOINT, f"{CHECKPOINT}.old"))
    changes: dict[str, Any] = {"resume": folder} if any(file.is_file() for file in saved) else {"overwrite": True}
    return config.model_copy(update=changes)
