"""What happened in a run, in words, and what to change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import Literal

from toolkit.report.runs import Run
from toolkit.training.metrics_file import why_nothing_was_learnt

Tone = Literal["good", "note", "bad"]
FEWEST = 8
"""Steps from which on a curve is judged."""
FALL = 0.5
"""Part of its best mean reward, above where it began, that a run may lose before it counts as diverged."""
NO_ENTROPY = 0.01
"""Nats below which a policy hardly samples anything but its most probable token."""
MOST_UNIFORM = 0.8
"""Share of groups with equal rewards above which most of the sampling teaches nothing."""
SOLVED = 0.8
"""Held-out accuracy from which on prompts count as easy for the policy; as hard at one minus it."""
MOST_CLIPPED = 0.3
"""Share of clipped tokens above which the updates of a rollout are too large; well below 0.1 is usual."""
MANY_TRUNCATED = 0.5
"""Share of completions that did not end by themselves."""
CHANCE = "that may be chance"
WORSE = (
    ": the policy got worse; a smaller optimizer.lr, fewer training.minibatches or a KL term (kl=k3) keep it nearer to "
    "where it was"
)
"""What to change after a clear loss."""
MANY = 20
"""Standard errors beyond which their number says nothing more."""


@dataclass(frozen=True)
class Remark:
    """A sentence about a run."""

    tone: Tone
    text: str


def remarks(run: Run) -> list[Remark]:
    """Return what is worth saying about a run, the most important first."""
    said = [*_end(run), *_nothing_learnt(run), *_divergence(run), *_curves(run)]
    if not any(remark.tone == "bad" for remark in said):
        said = [*_result(run), *said]
    return said


def _end(run: Run) -> Iterator[Remark]:
    done, planned = len(run.main), run.planned_steps
    of = f"{done} of {planned} steps" if planned is not None else f"{done} steps"
    go_on = f"training.resume={run.folder} goes on from its last checkpoint, given its overrides"
    if run.summary.get("interrupted"):
        yield Remark("bad", f"It was interrupted after {of}: {go_on}.")
    elif not run.summary:
        yield Remark("bad", f"It has not come to its end: {of} are there. If it no longer runs, {go_on}.")


def _nothing_learnt(run: Run) -> Iterator[Remark]:
    reason = why_nothing_was_learnt(run.rows)
    if reason is not None:
        yield Remark("bad", f"Nothing was learnt: all updates were skipped, because {reason}.")
    elif run.main and not any(row.get("grad_norm") is not None for row in run.main):
        yield Remark(
            "bad",
            "Nothing was learnt: every update was skipped, for lack of a token to learn from or of a finite gradient; "
            "see skipped_updates, overflowed_updates and non_finite_tokens.",
        )


def _divergence(run: Run) -> Iterator[Remark]:
    broken = next((row for row in run.main if row.get("loss", 0.0) is None and row.get("grad_norm", 0.0) is None), None)
    remedy = (
        "a smaller optimizer.lr, optimizer.max_grad_norm or clip range, fewer training.minibatches, or a KL (kl=k3)"
    )
    if broken is not None:
        yield Remark(
            "bad", f"It diverged: at step {broken['step'] + 1} loss and gradient are not finite; try {remedy}."
        )
        return
    rewards = _values(run, "reward")
    window = max(2, len(rewards) // 10)
    if len(rewards) < FEWEST:
        return
    means = [fmean(rewards[start : start + window]) for start in range(len(rewards) - window + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    first, top, last = means[0], means[best], means[-1]
    noise = 2 * _noise(rewards) / math.sqrt(window)
    if top - first > noise and top - last > FALL * (top - first) + noise:
        yield Remark(
            "bad",
            f"It diverged: the mean reward rose from {first:.3f} to {top:.3f} around step {best + window} and fell to "
            f"{last:.3f}; keep the checkpoint of that step, or try {remedy}.",
        )


def _curves(run: Run) -> Iterator[Remark]:
    """Remark on the last third of curves that stand out."""
    checks: tuple[tuple[str, Callable[[float], bool], str], ...] = (
        (
            "uniform_groups",
            lambda x: MOST_UNIFORM <= x < 1,
            "In the last third of the run the rewards were equal in {:.0%} of the groups, which teach nothing: "
            + _why_uniform(run),
        ),
        (
            "entropy",
            lambda x: x < NO_ENTROPY,
            "The policy's entropy fell to {:.4f} nats: it hardly explores any more; a smaller learning rate, an "
            "entropy bonus (loss.entropy_coef) or a wider upper clip range (policy_loss.cliprange_high) keep it up.",
        ),
        (
            "clip_fraction",
            lambda x: x > MOST_CLIPPED,
            "{:.0%} of the tokens were clipped: the updates of a rollout move the policy far; a smaller learning rate "
            "or fewer training.minibatches keep it closer.",
        ),
        (
            "truncated",
            lambda x: x > MANY_TRUNCATED,
            "{:.0%} of the completions were cut off: raise rollout.max_new_tokens.",
        ),
    )
    for name, stands_out, text in checks:
        values = _values(run, name)
        if len(values) >= FEWEST and stands_out(fmean(values[-len(values) // 3 :])):
            yield Remark("note", text.format(fmean(values[-len(values) // 3 :])))


def _why_uniform(run: Run) -> str:
    """Return why most groups have equal rewards, by the held-out accuracy where it decides, and what helps."""
    accuracy = run.summary.get("accuracy_after")
    if accuracy is not None and accuracy >= SOLVED:
        return "nearly all prompts are solved, so it may stop earlier, or go on with harder prompts."
    if accuracy is not None and accuracy <= 1 - SOLVED:
        return "hardly any prompt is solved; easier prompts, a partial reward or a larger rollout.group_size help."
    return "the prompts have become too easy or are too hard; a larger rollout.group_size or other prompts help."


def _result(run: Run) -> Iterator[Remark]:
    for name, words, sign in (
        ("accuracy", "held-out accuracy", 1),
        ("heldout_reward", "held-out reward", 1),
        ("heldout_nll", "held-out nll", -1),
    ):
        before, after = (run.summary.get(f"{name}_{when}") for when in ("before", "after"))
        if before is not None and after is not None:
            errors = _in_errors(run, name, before, after)
            gain = sign * (after - before)
            is_worse = gain < 0 and bool(errors) and CHANCE not in errors
            tone: Tone = "good" if gain > 0 else "bad" if is_worse else "note"
            yield Remark(tone, f"The {words} went from {before:.3f} to {after:.3f}{errors}{WORSE if is_worse else ''}.")
            return


def _in_errors(run: Run, name: str, before: float, after: float) -> str:
    """Return the difference in standard errors over the held-out prompts, where they are known."""
    errors = [run.summary.get(f"heldout_reward_se_{when}") for when in ("before", "after")]
    if name == "heldout_nll" or None in errors:
        return ""
    spread = math.hypot(*errors)  # type: ignore[arg-type]
    if not spread:
        return ""
    size = (after - before) / spread
    if abs(size) > MANY:  # near 0 and 1 the error itself is not well known
        return f", more than {MANY} standard errors"
    return f", {abs(size):.1f} standard errors" + ("" if abs(size) > 2 else f": {CHANCE}")


def _noise(values: Sequence[float]) -> float:
    """Return the standard deviation of a value around its curve, from differences of neighbours."""
    steps = [(second - first) ** 2 for first, second in pairwise(values)]
    return math.sqrt(fmean(steps) / 2) if steps else 0.0


def _values(run: Run, name: str) -> list[float]:
    return [row[name] for row in run.main if row.get(name) is not None]
