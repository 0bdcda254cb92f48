"""What a person sees while a run is under way: a live bar on a terminal, whole lines when piped."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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


class PhaseProgress:
    """The progress of one phase; does nothing on processes other than the main one."""

    def __init__(self, console: Console, title: str, num_steps: int, first_step: int, log_every: int) -> None:
        self._console, self._title, self._num_steps, self._log_every = console, title, num_steps, log_every
        self._bar: Progress | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task(title, total=num_steps, completed=first_step, shown="")

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, metrics: dict[str, float], *, is_last: bool) -> None:
        """Show the metrics of a finished step; the last one may come before the planned number."""
        shown = "  ".join(
            f"{label} {metrics[name]:{form}}"
            for name, (label, form) in SHOWN.items()
            if name in metrics and not math.isnan(metrics[name])
        )
        if self._bar is not None:
            total = step + 1 if is_last else self._num_steps
            self._bar.update(self._task, completed=step + 1, total=total, shown=shown)
        elif step % self._log_every == 0 or is_last:
            self._console.print(
                f"{self._title} {step + 1:>4}/{self._num_steps}  {shown}", highlight=False, soft_wrap=True
            )
