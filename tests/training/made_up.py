"""Checkpoints made up for tests that load no model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.training.saved import write_manifest


def a_checkpoint(folder: Path, step: int = 1, phase: str = "main", **state: Any) -> Path:
    """Write what is read of a checkpoint before torch is loaded; `state` holds further entries of it."""
    folder.mkdir(parents=True, exist_ok=True)
    usual = {"phase": phase, "next_step": step, "num_updates": 0, "num_skipped": 0, "kl_control": None, "identity": {}}
    (folder / "state.json").write_text(json.dumps(usual | state))
    write_manifest(folder, phase, step)
    return folder
