"""The end of a run: summary.json, curves.png and a printed summary."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.tasks.base import Example
from toolkit.training.disk import write_atomically
from toolkit.training.evaluation import EVALUATION, Evaluation
from toolkit.training.metrics_file import why_nothing_was_learnt
from toolkit.training.output_dir import MODEL
from toolkit.training.resume_command import how_to_continue
from toolkit.training.sample_log import SAMPLES

if TYPE_CHECKING:
    from toolkit.training.trainer import Trainer


HELD_OUT = "#238b45"
"""Colour of what was measured on held-out prompts."""
MOST_SHOWN = 160
"""Characters of a prompt or completion in the printed table."""


@dataclass(frozen=True)
class Summary:
    """Results of a run."""

    accuracy_before: float | None
    """Greedy accuracy on the held-out examples before the main phase; None when it was not reached, or for rewards that
    are not a verifier's."""
    accuracy_after: float | None
    """The same at the end; None when the run was interrupted."""
    heldout_reward_before: float | None
    """Mean reward of greedy completions of the held-out prompts, before the main phase."""
    heldout_reward_se_before: float | None
    """Its standard error over the prompts."""
    heldout_reward_after: float | None
    heldout_reward_se_after: float | None
    heldout_nll_before: float | None
    """Negative log-likelihood of the held-out completions in the data, in nats a token; with loss=ce."""
    heldout_nll_after: float | None
    heldout_sampled_before: Mapping[str, float]
    """Mean reward and pass@k of sampled completions of the held-out prompts, before the main phase."""
    heldout_sampled_after: Mapping[str, float]
    heldout_intervals_before: Mapping[str, tuple[float, float]]
    """95% intervals of accuracy, reward and what `heldout_sampled_before` has."""
    heldout_intervals_after: Mapping[str, tuple[float, float]]
    wall_seconds: float
    """From the start of the program to the end of the last evaluation, imports included."""
    seed: int
    loss: str
    num_processes: int
    skipped_updates: int
    """Optimizer steps without a single scored token."""
    overflowed_updates: int
    """Optimizer steps skipped because the loss scale of fp16 was too large."""
    nonfinite_updates: int
    """Optimizer steps skipped because the gradient was NaN or infinite."""
    interrupted: bool
    stopped_by: str | None
    """Signal that asked the run to stop, e.g. SIGTERM."""
    output_dir: str

    @property
    def objective(self) -> float | None:
        """What a sweeper may maximise: accuracy, else mean reward, else likelihood."""
        return Evaluation(self.accuracy_after, (), self.heldout_reward_after, nll=self.heldout_nll_after).objective

    @classmethod
    def of_dry_run(cls, trainer: Trainer, *, wall_seconds: float, output_dir: Path) -> Summary:
        """Return the summary of a run that trained nothing."""
        nothing = Evaluation()
        return cls.of(trainer, nothing, nothing, wall_seconds=wall_seconds, output_dir=output_dir, interrupted=False)

    @classmethod
    def of(
        cls,
        trainer: Trainer,
        before: Evaluation,
        after: Evaluation,
        *,
        wall_seconds: float,
        output_dir: Path,
        interrupted: bool,
        signal_number: int = 0,
    ) -> Summary:
        """Return the summary of a finished or interrupted run."""
        loss = trainer.config.loss
        policy_loss = loss.policy.name if isinstance(loss, BaseRLLossConfig) else None
        return cls(
            accuracy_before=before.accuracy,
            accuracy_after=after.accuracy,
            heldout_reward_before=before.reward,
            heldout_reward_se_before=before.reward_se,
            heldout_reward_after=after.reward,
            heldout_reward_se_after=after.reward_se,
            heldout_nll_before=before.nll,
            heldout_nll_after=after.nll,
            heldout_sampled_before=before.sampled,
            heldout_sampled_after=after.sampled,
            heldout_intervals_before=before.intervals,
            heldout_intervals_after=after.intervals,
            wall_seconds=round(wall_seconds, 2),
            seed=trainer.config.seed,
            loss=type(loss).__name__ + (f"/{policy_loss}" if policy_loss else ""),
            num_processes=trainer.accelerator.num_processes,
            skipped_updates=trainer.updater.num_skipped,
            overflowed_updates=trainer.updater.num_overflows,
            nonfinite_updates=trainer.updater.num_nonfinite,
            interrupted=interrupted,
            stopped_by=signal.Signals(signal_number).name if signal_number else None,
            output_dir=str(output_dir),
        )


def write_report(
    summary: Summary,
    rows: Sequence[dict[str, Any]],
    examples: Sequence[Example],
    before: Evaluation,
    after: Evaluation,
    console: Console,
) -> None:
    """Write summary.json and curves.png, and print the results."""
    output_dir = Path(summary.output_dir)
    write_atomically(output_dir / "summary.json", json.dumps(asdict(summary), indent=2) + "\n")
    draw_curves(summary, rows, output_dir / "curves.png")
    if summary.interrupted:
        launcher = " (under the same launcher)" if summary.num_processes > 1 else ""
        message = f"\ninterrupted; the checkpoint is saved. Continue with{launcher}: {how_to_continue(output_dir)}"
        console.print(message, soft_wrap=True, markup=False)
        return
    if examples:
        table = Table("prompt", "before", "after", "answer", title="held-out examples (greedy)")
        for example, old, new in zip(examples, before.completions, after.completions, strict=True):
            table.add_row(_in_cell(_asked(example), keep_end=True), *map(_in_cell, (old, new, example.answer)))
        console.print(table)
    for name in after.notable:
        earlier = f"{before.sampled[name]:.3f} -> " if name in before.sampled else ""
        sampled = f"held-out {name} {earlier}{after.sampled[name]:.3f}{after.shown_interval(name)}"
        console.print(sampled, soft_wrap=True, markup=False)
    first = before.shown(with_interval=False)
    measured = f"held-out {first} -> {after.shown().partition(' ')[2]} " if after.shown() else ""
    took = f"in {summary.wall_seconds:.1f} s (imports included), seed {summary.seed}"
    console.print(f"{measured}{took}", style="bold", soft_wrap=True, markup=False)
    reason = why_nothing_was_learnt(rows)
    if reason is not None:
        console.print(f"nothing was learnt: all updates were skipped, because {reason}", style="bold", soft_wrap=True)
    model = f", {MODEL}/" if (output_dir / MODEL).is_dir() else ""
    samples = f"{SAMPLES}, " if (output_dir / SAMPLES).is_file() else ""
    files = f"metrics.jsonl, {samples}summary.json, curves.png, config.yaml, checkpoint/{model}"
    console.print(f"{files} in {output_dir}", soft_wrap=True)


def _asked(example: Example) -> str:
    """Return what tells a prompt from others: the last message of a chat, without the template."""
    is_chat = isinstance(example.source, list) and isinstance(example.source[-1].get("content"), str)
    return str(example.source[-1]["content"]) if is_chat else example.prompt


def _in_cell(text: str, *, keep_end: bool = False) -> str:
    """Return a text for a cell of the table: on one line, cut if it is long, its brackets as they are."""
    line = text.replace("\n", "\\n")
    cut = f"...{line[3 - MOST_SHOWN :]}" if keep_end else f"{line[: MOST_SHOWN - 3]}..."
    return escape(line if len(line) <= MOST_SHOWN else cut)


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
    if not panels:
        figure.text(0.5, 0.5, "no step has measured anything: see metrics.jsonl", ha="center")
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
        if index == 0:
            _draw_evaluations(axes, [row for row in rows if row["phase"] == EVALUATION], is_rl=is_rl)
    title = f"{summary.loss}, seed {summary.seed}"
    for name in ("accuracy", "heldout_reward", "heldout_nll"):
        first, last = getattr(summary, f"{name}_before"), getattr(summary, f"{name}_after")
        if first is not None and last is not None:
            title += f": held-out {name.removeprefix('heldout_')} {first:.2f} → {last:.2f}"
            break
    figure.suptitle(title, fontsize=13, x=0.01, ha="left", fontweight="bold")
    figure.savefig(path, dpi=130)


def _draw_line(axes: Any, steps: list[int], values: list[float], *, is_main: bool) -> None:
    """Draw the values faintly and their running mean over them."""
    window = max(1, len(values) // 25)
    smooth = [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]
    axes.plot(steps, values, color="#9ecae1", linewidth=0.8)
    axes.plot(steps, smooth, color="#08519c", linewidth=2.2 if is_main else 1.4)


def _draw_evaluations(axes: Any, rows: Sequence[dict[str, Any]], *, is_rl: bool) -> None:
    """Draw what was measured on held-out prompts, with its 95% interval: points, or levels before and after."""
    names = ("accuracy", "reward") if is_rl else ("nll",)
    name = next((name for name in names if any(row.get(name) is not None for row in rows)), None)
    if name is None:
        return
    rows = [row for row in rows if row.get(name) is not None]
    steps, values = [row["step"] for row in rows], [row[name] for row in rows]
    label = f"held-out {name}" + (", greedy" if is_rl else "")
    if len(rows) > 2:
        low, high = ([row.get(f"{name}_{end}", row[name]) for row in rows] for end in ("low", "high"))
        has_interval = any(f"{name}_low" in row for row in rows)
        axes.plot(steps, values, color=HELD_OUT, marker="o", markersize=4, linewidth=1.4,
                  label=f"{label}, with 95% interval" if has_interval else label)  # fmt: skip
        axes.fill_between(steps, low, high, color=HELD_OUT, alpha=0.18, linewidth=0)
    else:
        for when, color, value in zip(("before", "after"), ("#b0b0b0", HELD_OUT), values, strict=False):
            axes.axhline(value, color=color, linestyle="--", linewidth=1.2, label=f"{label}, {when}: {value:.3f}")
    if name == "accuracy":
        axes.set_ylim(0, 1.02)
    axes.legend(loc="lower right" if is_rl else "upper right", fontsize=9, frameon=False)
