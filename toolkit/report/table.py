"""The comparison of runs as a table on the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.report.comparison import Comparison


def show(comparison: Comparison, console: Console) -> None:
    """Print the choices, the best first, and which of them is ahead."""
    key, labels = _short([choice.label for choice in comparison.choices])
    table = Table(title=comparison.measure, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(key or "choice", overflow="fold", min_width=12)
    for head in ("seeds", "mean ± spread", "best", "behind \\[95 %]", "noise", "time"):
        table.add_column(head, justify="right", no_wrap=True)
    for label, choice, behind in zip(labels, comparison.choices, comparison.behind, strict=True):
        best = max(choice.known, key=lambda value: comparison.sign * value, default=None)
        table.add_row(
            escape(label),
            str(len(choice.runs)),
            f"{_number(choice.mean)}{_number(choice.spread, ' ± ')}",
            _number(best),
            "" if behind is None else f"{behind.value:.3f} \\[{behind.low:.3f}, {behind.high:.3f}]",
            "" if behind is None else "no" if behind.is_clear else "maybe",
            "-" if choice.seconds is None else f"{choice.seconds:.0f} s",
        )
    console.print(table)
    console.print(comparison.verdict, style="bold", soft_wrap=True, markup=False)


def _short(labels: list[str]) -> tuple[str | None, list[str]]:
    """Return the key of labels that are one override of the same key, and their values; else None and the labels."""
    keys = {label.partition("=")[0] for label in labels}
    if len(labels) > 1 and len(keys) == 1 and all("=" in label and " " not in label for label in labels):
        return keys.pop(), [label.partition("=")[2] for label in labels]
    return None, labels


def _number(value: float | None, before: str = "") -> str:
    return ("" if before else "-") if value is None else f"{before}{value:.3f}"
