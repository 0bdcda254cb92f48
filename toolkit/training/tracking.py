"""metrics.jsonl, and any tracker that accelerate knows.

Both have one axis: the line of metrics.jsonl, counted from 0 over both phases and all evaluations. A resumed run keeps
the lines before its checkpoint, so it goes on with the number that the uninterrupted run would have had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator

from toolkit.training.config import TrackerConfig
from toolkit.training.disk import write_atomically
from toolkit.training.evaluation import EVALUATION
from toolkit.training.metrics_file import as_line, read_rows
from toolkit.training.tracker_run import Shown, TrackerRun

METRICS = "metrics.jsonl"
TIMED = ("seconds", "tokens_per_second")
"""Metrics of the clock, which differ between equal runs."""


class Tracker:
    """Writes one JSON line for each step and evaluation; a context manager, around all that is logged.

    On the main process only.
    """

    def __init__(
        self, config: TrackerConfig, accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any]
    ) -> None:
        self._is_main = accelerator.is_main_process
        self.path = output_dir / METRICS
        self._restored: list[dict[str, Any]] = []
        self._evaluated: list[dict[str, Any]] = []
        """Restored lines of evaluations: the one after the last step of a checkpoint is made again."""
        self._number = 0
        """Of the next line."""
        self._earlier_dir: Path | None = None
        has_run = config.log_with is not None and self._is_main
        self._run = TrackerRun(config, accelerator, output_dir, settings) if has_run else None

    @property
    def rows(self) -> list[dict[str, Any]]:
        """All lines so far, read from the file: a long run does not keep them in memory."""
        return read_rows(self.path) if self.path.is_file() else []

    def restore(self, run_dir: Path, phase: str, next_step: int) -> None:
        """Restore the lines that an earlier run wrote before the step that it resumes at.

        Raises:
            ConfigError: a line other than the last is damaged.
        """
        self._earlier_dir = run_dir
        source = run_dir / METRICS
        if source.is_file():
            self._restored = [row for row in read_rows(source) if _is_before(row, phase, next_step)]

    def __enter__(self) -> Self:
        """Start the file with the restored lines, and the run of the tracker.

        Raises:
            ConfigError: the tracker does not start.
        """
        if self._is_main:
            write_atomically(self.path, "".join(map(as_line, self._restored)))
        if self._run is not None:
            self._run.start(self._restored, self._earlier_dir)
        self._number = len(self._restored)
        self._evaluated = [row for row in self._restored if row["phase"] == EVALUATION]
        self._restored = []
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the tracker finish writing, also after an error or Ctrl-C."""
        if self._run is not None:
            self._run.finish(has_failed=kind is not None)

    def log(self, phase: str, step: int, metrics: Mapping[str, float], shown: Sequence[Shown] = ()) -> None:
        """Write the metrics of a finished step or evaluation; NaN (nothing measured) becomes null.

        Args:
            phase: warmup, main or evaluation.
            step: of the phase, from 0; for an evaluation the steps of the main phase before it.
            metrics: by name.
            shown: completions for trackers that show some.
        """
        if not self._is_main:
            return
        row = {"phase": phase, "step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        with self.path.open("a") as file:
            file.write(as_line(row))
        if self._run is not None:
            self._run.log(self._number, row, shown)
        self._number += 1

    def log_evaluation(self, step: int, metrics: Mapping[str, float], shown: Sequence[Shown] = ()) -> None:
        """Do the same for an evaluation, unless a restored line says it already, but for the time that it took."""
        expected = {"phase": EVALUATION, "step": step, **metrics}
        if not any(_untimed(row) == _untimed(expected) for row in self._evaluated):
            self.log(EVALUATION, step, metrics, shown)


def _untimed(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in TIMED}


def _is_before(row: Mapping[str, Any], phase: str, next_step: int) -> bool:
    """Whether a run that resumes at `next_step` of `phase` has done what a line says."""
    if row["phase"] == "warmup":
        return phase != "warmup" or row["step"] < next_step
    if phase == "warmup":
        return False
    # An evaluation after `next_step` steps was made before their checkpoint was written.
    return bool(row["step"] < next_step + (row["phase"] != "main"))
