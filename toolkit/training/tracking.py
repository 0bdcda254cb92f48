"""metrics.jsonl, and any tracker that accelerate knows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from toolkit.training.config import TrackerConfig
from toolkit.training.disk import write_atomically
from toolkit.training.metrics_file import read_rows


class Tracker:
    """Writes one JSON line for each step; the main process only."""

    def __init__(
        self, config: TrackerConfig, accelerator: Accelerator, output_dir: Path, settings: dict[str, Any]
    ) -> None:
        self._accelerator = accelerator
        self._log_with = config.log_with
        self.path = output_dir / "metrics.jsonl"
        self._restored: list[dict[str, Any]] = []
        self._has_begun = False
        if config.log_with is not None:
            accelerator.init_trackers(config.project, config=_flat(settings))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All lines so far, read from the file of the main process: a long run does not keep them in memory."""
        return read_rows(self.path) if self._has_begun and self.path.is_file() else self._restored

    def restore(self, run_dir: Path, phase: str, next_step: int) -> None:
        """Restore the lines that an earlier run wrote before the step that it resumes at."""
        source = run_dir / self.path.name
        if not source.is_file():
            return
        lines = read_rows(source)
        order = ("warmup", "main")
        resumed_at = (order.index(phase), next_step)
        self._restored = [row for row in lines if (order.index(row["phase"]), row["step"]) < resumed_at]

    def log(self, phase: str, step: int, metrics: dict[str, float]) -> None:
        """Write the metrics of a finished step; NaN (nothing measured) becomes null."""
        row = {"phase": phase, "step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self._begin()
        if self._accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._log_with is not None:
            self._accelerator.log({f"{phase}/{name}": value for name, value in metrics.items()}, step=step)

    def _begin(self) -> None:
        """Start a new file with the restored lines: the folder may hold the file of another run."""
        if not self._has_begun and self._accelerator.is_main_process:
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in self._restored))
            self._restored = []
        self._has_begun = True

    def close(self) -> None:
        """Let trackers finish writing."""
        self._begin()
        if self._log_with is not None:
            self._accelerator.end_training()


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, bool)) else str(value)
    return flat
