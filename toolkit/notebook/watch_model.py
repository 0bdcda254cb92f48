"""A run as it goes, as charts: read from its files, before, during and after it. No widgets here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError
from toolkit.notebook.charts import Chart, Line, View
from toolkit.notebook.token_records import is_number
from toolkit.report.runs import CONFIG, METRICS, SAMPLES, SUMMARY, Run, folders_of_runs, read_run
from toolkit.report.story import remarks

EVALUATION = "evaluation"
HELD_OUT = "held-out "
"""What the label of a curve begins with that is read from evaluations; the others are of the main phase."""
PANELS: tuple[tuple[str, str, tuple[tuple[str, str], ...]], ...] = (
    (
        "Reward",
        "reward",
        (("reward", "mean reward"), ("accuracy", f"{HELD_OUT}accuracy"), ("reward", f"{HELD_OUT}reward")),
    ),
    ("KL", "nats", (("kl_old", "to the old policy"), ("kl_ref", "to the reference"))),
    ("Policy entropy", "nats", (("entropy", "entropy"),)),
    (
        "Clipped tokens",
        "% of tokens",
        (
            ("clip_fraction_low", "below the range (PPO: A < 0)"),
            ("clip_fraction_high", "above the range (PPO: A > 0)"),
            ("dual_clip_fraction", "dual clip (A < 0)"),
        ),
    ),
    ("Throughput", "tokens a second", (("tokens_per_second", "all processes"),)),
    ("Gradient norm", "before clipping", (("grad_norm", "gradient norm"),)),
)
"""Title, unit and metrics of each chart; charts without a value are left out."""
PERCENT = "% of tokens"
SWEEP = "multirun.yaml"
"""What Hydra writes into the folder of a sweep when it begins."""
QUIET = 120.0
"""Seconds without a new line after which a run without a summary is said to be silent."""


@dataclass
class WatchModel:
    """The files of a run, read again whenever they have changed."""

    folder: Path
    run: Run | None = None
    """None: it has not made a step."""
    error: str = ""
    """What is wrong with its files; empty: nothing."""
    others: tuple[Path, ...] = ()
    """Runs in folders below, where the folder itself holds none."""
    _stamp: tuple[Any, ...] = field(default=(), init=False)

    def refresh(self) -> bool:
        """Read the files if they have changed since the last time; return whether they had."""
        names = ("", METRICS, SAMPLES, SUMMARY, CONFIG)
        stamp = tuple(_stamp(self.folder / name) for name in names)
        if stamp == self._stamp:
            return False
        self._stamp = stamp
        try:
            has_run = (self.folder / METRICS).is_file()
            self.run = read_run(self.folder) if has_run else None
            self.others = () if has_run or not self.folder.is_dir() else tuple(folders_of_runs(self.folder))
            self.error = ""
        except (ConfigError, OSError) as error:
            self.error = str(error)
        return True

    @property
    def is_done(self) -> bool:
        """Whether the run has come to its end."""
        return self.run is not None and bool(self.run.summary)

    def status(self) -> str:
        """Return how far the run is, in words."""
        if self.error:
            return f"error: {self.error}"
        if self.run is None:
            return self._why_nothing_is_there()
        steps, planned = len(self.run.main), self.run.planned_steps
        progress = f"{steps} steps" if planned is None else f"{steps} of {planned} steps"
        if self.is_done and not self.run.rows and planned != 0:
            return f"{self.run.name}: {SUMMARY} is there, so it has ended, but {METRICS} is empty: no step is known"
        if self.is_done:
            return f"{self.run.name}: ended after {progress}"
        age = time.time() - (self.folder / METRICS).stat().st_mtime
        silent = f"; no step for {age:.0f} s" if age > QUIET else ""
        return f"{self.run.name}: {progress}{silent}"

    def _why_nothing_is_there(self) -> str:
        if not self.folder.is_dir():
            return f"waiting for {self.folder}: the folder does not exist"
        if self.others or (self.folder / SWEEP).is_file():
            example = self.others[0] if self.others else self.folder / "0"
            number = f" of {len(self.others)}" if self.others else ""
            return f"{self.folder} is not a run but holds several; watch one{number}, such as {str(example)!r}"
        if (self.folder / SUMMARY).is_file():
            return f"{self.folder} has {SUMMARY}, so the run has ended, but no {METRICS}: no step is known"
        return f"waiting for {self.folder / METRICS}: the run has not made a step"

    def view(self) -> View:
        """Return the charts, and what is remarkable about the run."""
        notes = [self.status()]
        if self.run is None:
            return View(notes=tuple(notes))
        notes += [remark.text for remark in remarks(self.run)] if self.is_done else []
        charts = [chart for panel in PANELS if (chart := _chart(self.run.rows, *panel)) is not None]
        return View(charts=tuple(charts), notes=tuple(notes))


def _chart(
    rows: Sequence[Mapping[str, Any]], title: str, unit: str, metrics: Sequence[tuple[str, str]]
) -> Chart | None:
    lines: list[Line] = []
    for style, (name, label) in enumerate(metrics):
        phase = EVALUATION if label.startswith(HELD_OUT) else "main"
        points = [
            # An evaluation stands after the step whose number it carries, as in the report.
            (row["step"] + (phase != EVALUATION), row[name] * (100 if unit == PERCENT else 1))
            for row in rows
            if row.get("phase") == phase and is_number(row.get(name))
        ]
        has_evaluation = any(line.label.startswith(HELD_OUT) for line in lines)
        if points and not (phase == EVALUATION and has_evaluation):  # accuracy and reward are often the same
            points = sorted(dict(points).items())
            lines.append(Line(label=label, x=[x for x, _ in points], y=[y for _, y in points], style=style))
    if not lines:
        return None
    return Chart(title=title, x_label="step", y_label=unit, lines=tuple(lines))


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size
