"""The end of a run: summary.json, curves.png and a printed summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.tasks.base import Example

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


@dataclass(frozen=True)
class Summary:
    """Results of a run."""

    accuracy_before: float | None
    """Greedy accuracy on the held-out examples before the main phase; None when it was not reached."""
    accuracy_after: float | None
    """The same at the end; None when the run was interrupted."""
    wall_seconds: float
    """From the start of the program to the end of the last evaluation, imports included."""
    seed: int
    loss: str
    num_processes: int
    skipped_updates: int
    """Optimizer steps without a single scored token."""
    overflowed_updates: int
    """Optimizer steps skipped because the loss scale of fp16 was too large."""
    interrupted: bool
    output_dir: str

    @classmethod
    def of(
        cls, trainer: Trainer, before: float | None, after: float | None, *, wall_seconds: float, output_dir: Path
    ) -> Summary:
        """Return the summary of a finished or interrupted run."""
        loss = trainer.config.loss
        policy_loss = loss.policy.name if isinstance(loss, BaseRLLossConfig) else None
        return cls(
            accuracy_before=before,
            accuracy_after=after,
            wall_seconds=round(wall_seconds, 2),
            seed=trainer.config.seed,
            loss=type(loss).__name__ + (f"/{policy_loss}" if policy_loss else ""),
            num_processes=trainer.accelerator.num_processes,
            skipped_updates=trainer.num_skipped,
            overflowed_updates=trainer.num_overflows,
            interrupted=after is None,
            output_dir=str(output_dir),
        )


def write_report(
    summary: Summary,
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    before: Sequence[str],
    after: Sequence[str],
    console: Console,
) -> None:
    """Write summary.json and curves.png, and print the results."""
    output_dir = Path(summary.output_dir)
    (output_dir / "summary.json").write_text(json.dumps(asdict(summary), indent=2) + "\n")
    draw_curves(summary, rows, output_dir / "curves.png")
    if summary.interrupted:
        message = f"\ninterrupted; the checkpoint is saved. Continue with: training.resume={output_dir}"
        console.print(message, soft_wrap=True)
        return
    table = Table("prompt", "before", "after", "answer", title="held-out examples (greedy)")
    for example, old, new in zip(examples, before, after, strict=True):
        table.add_row(example.prompt, old, new, example.answer)
    console.print(table)
    console.print(
        f"held-out accuracy {summary.accuracy_before:.3f} -> {summary.accuracy_after:.3f} "
        f"in {summary.wall_seconds:.1f} s (imports included), seed {summary.seed}",
        style="bold",
    )
    files = "metrics.jsonl, summary.json, curves.png, config.yaml, checkpoint/"
    console.print(f"{files} in {output_dir}", soft_wrap=True)


def draw_curves(summary: Summary, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the curves: reward on top, what explains it below."""
    from matplotlib.figure import Figure  # without pyplot, whose back-end belongs to the notebook
    from matplotlib.ticker import MaxNLocator

    main = [row for row in rows if row["phase"] == "main"]
    is_rl = any("reward" in row for row in main)
    has_reference = any("kl_ref" in row for row in main)
    panels = [
        (
            "reward" if is_rl else "nll",
            "mean reward of sampled completions" if is_rl else "negative log-likelihood, nats",
        ),
        ("entropy" if is_rl else "lr", "policy entropy, nats" if is_rl else "learning rate"),
        ("kl_ref", "KL to the reference, nats") if has_reference else ("kl_old", "KL within a step, nats"),
        ("clip_fraction", "clipped tokens, fraction"),
        ("grad_norm", "gradient norm before clipping"),
    ]
    panels = [panel for panel in panels if any(row.get(panel[0]) is not None for row in main)]
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    grid = figure.add_gridspec(2, max(len(panels) - 1, 1), height_ratios=[1.6, 1])
    for index, (name, label) in enumerate(panels):
        axes = figure.add_subplot(grid[0, :] if index == 0 else grid[1, index - 1])
        points = [(row["step"] + 1, row[name]) for row in main if row.get(name) is not None]
        _draw_line(axes, [x for x, _ in points], [y for _, y in points], is_main=index == 0)
        axes.set_title(label, fontsize=11 if index == 0 else 9, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.tick_params(labelsize=8)
        if index == 0 and is_rl:
            _mark_accuracy(axes, summary)
    title = f"{summary.loss}, seed {summary.seed}"
    if summary.accuracy_after is not None and summary.accuracy_before is not None:
        title += f": held-out accuracy {summary.accuracy_before:.2f} → {summary.accuracy_after:.2f}"
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130)


def _draw_line(axes: Any, steps: list[int], values: list[float], *, is_main: bool) -> None:
    """Draw the values faintly and their running mean over them."""
    window = max(1, len(values) // 25)
    smooth = [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8)
    axes.plot(steps, smooth, color="#08519c", linewidth=2.2 if is_main else 1.4)


def _mark_accuracy(axes: Any, summary: Summary) -> None:
    """Mark the held-out accuracies as horizontal lines on the reward panel."""
    for value, name, color in (
        (summary.accuracy_before, "greedy held-out accuracy before", "#b0b0b0"),
        (summary.accuracy_after, "greedy held-out accuracy after", "#238b45"),
    ):
        if value is not None:
            axes.axhline(value, color=color, linestyle="--", linewidth=1.2, label=f"{name}: {value:.3f}")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right", fontsize=9, frameon=False)
