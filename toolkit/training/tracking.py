"""metrics.jsonl, and any tracker that accelerate knows.

Both have one axis: the line of metrics.jsonl, counted from 0 over both phases and all evaluations. A resumed run keeps
the lines before its checkpoint, so it goes on with the number that the uninterrupted run would have had.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator

from toolkit.errors import ConfigError
from toolkit.training.config import TrackerConfig
from toolkit.training.tracker_run import Shown, TrackerRun

METRICS = "metrics.jsonl"
TIMED = ("seconds", "tokens_per_second")
"""Metrics of the clock, which differ between equal runs."""


class Tracker:
    """Writes one JSON line for each step and evaluation; a context manager, around all that is logged.

    On the main process only; the others keep the lines, too.
    """

    def __init__(
        self, config: TrackerConfig, accelerator: Accelerator, output_dir: Path, settings: Mapping[str, Any]
    ) -> None:
        self._is_main = accelerator.is_main_process
        self.path = output_dir / METRICS
        self.rows: list[dict[str, Any]] = []
        self.note: str | None = None
        """What was wrong with the lines of the run that is continued."""
        self._earlier_dir: Path | None = None
        has_run = config.log_with is not None and self._is_main
        self._run = TrackerRun(config, accelerator, output_dir, settings) if has_run else None

    def restore(self, run_dir: Path, phase: str, next_step: int) -> None:
        """Restore the lines that an earlier run wrote before the step that it resumes at.

        Raises:
            ConfigError: a line other than the last is damaged.
        """
        self._earlier_dir = run_dir
        source = run_dir / METRICS
        if not source.is_file():
            return
        lines, self.note = read_lines(source)
        self.rows = [row for row in lines if _is_before(row, phase, next_step)]

    def __enter__(self) -> Self:
        """Start the file with the restored lines, and the run of the tracker.

        Raises:
            ConfigError: the tracker does not start.
        """
        if self._is_main:
            fresh = self.path.with_name(f"{METRICS}.writing")
            fresh.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
            os.replace(fresh, self.path)  # a crash in between would lose the restored lines
        if self._run is not None:
            self._run.start(self.rows, self._earlier_dir)
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
        row = {"phase": phase, "step": step, **{k: v if math.isfinite(v) else None for k, v in metrics.items()}}
        self.rows.append(row)
        if self._is_main:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if self._run is not None:
            self._run.log(len(self.rows) - 1, row, shown)

    def log_once(self, phase: str, step: int, metrics: Mapping[str, float], shown: Sequence[Shown] = ()) -> None:
        """Do the same, unless a restored line says it already, but for the time that it took."""
        untimed = {name: value for name, value in metrics.items() if name not in TIMED}
        expected = {"phase": phase, "step": step, **untimed}
        if not any({name: row[name] for name in row if name not in TIMED} == expected for row in self.rows):
            self.log(phase, step, metrics, shown)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """Return the lines of a metrics.jsonl, without a last one that a crash has cut, and a note on that one.

    Raises:
        ConfigError: another line is damaged; names the file and the line.
    """
    rows: list[dict[str, Any]] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line.strip() else None
            if row is not None:
                rows.append({"phase": row["phase"], "step": int(row["step"]), **row})
        except (ValueError, KeyError, TypeError):  # not JSON, not text, or JSON that is not a line of metrics
            if number == len(lines):  # nothing follows, not even the end of the line
                return rows, f"the last line of {path} was cut and is left out"
            raise ConfigError(
                f"training.resume: line {number} of {path} is damaged: {line[:40]!r}; restore the file, or remove it "
                "to go on without the earlier lines"
            ) from None
    return rows, None


def _is_before(row: Mapping[str, Any], phase: str, next_step: int) -> bool:
    """Whether a run that resumes at `next_step` of `phase` has done what a line says."""
    if row["phase"] == "warmup":
        return phase != "warmup" or row["step"] < next_step
    if phase == "warmup":
        return False
    # An evaluation after `next_step` steps was made before their checkpoint was written.
    return bool(row["step"] < next_step + (row["phase"] != "main"))
