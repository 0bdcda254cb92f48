"""Progress of a run: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

import math
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

SHOWN = {
    "reward": ("reward", ".3f"),
    "nll": ("nll", ".3f"),
    "kl_ref": ("kl_ref", ".4f"),
    "kl_old": ("kl", ".4f"),
    "entropy": ("entropy", ".3f"),
    "clip_fraction": ("clip", ".3f"),
    "grad_norm": ("grad", ".2f"),
    "tokens_per_second": ("tok/s", ",.0f"),
}
"""Metric -> label and format, in the order shown."""
PERIOD = 600.0
"""Seconds whose steps tell how fast it goes; within the usual 30 a step of a larger model does not end."""


class PhaseProgress:
    """The progress of one phase; does nothing on processes other than the main one."""

    def __init__(self, console: Console, title: str, num_steps: int, first_step: int, log_every: int) -> None:
        self._console, self._title, self._num_steps, self._log_every = console, title, num_steps, log_every
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            speed_estimate_period=PERIOD,
        )
        self._task = self._bar.add_task(title, total=num_steps, completed=first_step)
        self._shown = Text()
        # The metrics get a separate line: next to the bar they would not fit into 80 columns.
        self._live = Live(Group(self._bar, self._shown), console=console) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, metrics: dict[str, float], *, is_last: bool) -> None:
        """Show the metrics of a finished step; the last one may come before the planned number."""
        shown = "  ".join(
            f"{label} {metrics[name]:{form}}"
            for name, (label, form) in SHOWN.items()
            if name in metrics and not math.isnan(metrics[name])
        )
        self._bar.update(self._task, completed=step + 1, total=step + 1 if is_last else self._num_steps)
        if self._live is not None:
            self._shown.plain = f"  {shown}"
        elif step % self._log_every == 0 or is_last:
            line = f"{self._title} {step + 1:>4}/{self._num_steps}  {shown}{self._time_left()}"
            self._console.print(line, soft_wrap=True)

    def _time_left(self) -> str:
        """Return how long the phase still takes, as the bar of a terminal says it; nothing in its last minute."""
        seconds = self._bar.tasks[0].time_remaining
        if seconds is None or seconds < 60:
            return ""
        hours, minutes = divmod(math.ceil(seconds / 60), 60)
        return f"  left {hours} h {minutes} min" if hours else f"  left {minutes} min"
