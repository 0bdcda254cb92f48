"""Several runs side by side: which settings differ, what each choice reached over its seeds, and which is ahead."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from toolkit.report.runs import Run
from toolkit.report.statistics import Difference, difference

MEASURES = {
    "accuracy_after": ("held-out accuracy", 1.0),
    "heldout_reward_after": ("held-out reward", 1.0),
    "heldout_nll_after": ("held-out nll, nats a token", -1.0),
}
"""Result in a summary -> what it is, and 1 if more is better, -1 if less is. The first that all runs have counts."""
LARGEST = {"held-out accuracy": 1.0}
"""What two means can differ by at most, where that is known; an interval ends there."""
LAST = 10
"""Steps whose mean reward stands for a run that measured nothing on held-out examples."""
PART_OF_LOSS = "loss.policy_loss_cfg."
LEAST = 0.0005
"""Difference that is shown as 0.001; below it two results are equal."""
SEED = "seed"
NO_CHOICE = re.compile(r"^(training\.(resume|overwrite|timeout_s|log_every|checkpoint_every|num_processes)|tracker\b)")
"""Settings that change no result."""


@dataclass(frozen=True)
class Choice:
    """Runs that share all settings but the seed."""

    label: str
    """What tells it from the others."""
    runs: tuple[Run, ...]
    values: tuple[float | None, ...]
    """Result of each run; None: it has none."""

    @property
    def known(self) -> list[float]:
        """The results that are there."""
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        """Mean over the seeds."""
        return fmean(self.known) if self.known else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for one."""
        return stdev(self.known) if len(self.known) > 1 else None

    @property
    def seconds(self) -> float | None:
        """Mean wall time."""
        times = [run.seconds for run in self.runs if run.seconds is not None]
        return fmean(times) if times else None


@dataclass(frozen=True)
class Comparison:
    """Choices in the order of their results, the best first."""

    measure: str
    """What is compared."""
    sign: float
    """1 if more is better, -1 if less is."""
    choices: tuple[Choice, ...]
    behind: tuple[Difference | None, ...]
    """How much each choice is behind the best one; None for the best itself, and where it cannot be known."""
    differing: dict[str, list[str]]
    """Setting -> its value in each run, of settings that are not the same in all."""

    @property
    def verdict(self) -> str:
        """One or two sentences: which choice is ahead, by how much, and whether that may be noise."""
        ranked = [choice for choice in self.choices if choice.mean is not None]
        if not ranked:
            return "No run has come to a result yet."
        best = ranked[0]
        if len(ranked) == 1:
            spread = "" if best.spread is None else f" (standard deviation {best.spread:.3f} over {_seeds(best)})"
            return f"{best.label}: {self.measure} {best.mean:.3f}{spread}."
        second = ranked[1]
        assert best.mean is not None
        assert second.mean is not None
        lead = (best.mean - second.mean) * self.sign
        if abs(lead) < LEAST:
            return f"{best.label} and {second.label} are equal in {self.measure} ({best.mean:.3f})."
        ahead = f"{best.label} is ahead of {second.label} by {lead:.3f} in {self.measure}"
        behind = self.behind[self.choices.index(second)]
        if behind is None:
            return f"{ahead}; one run of a choice cannot tell that from noise: add seeds (-m seed=0,1,2)."
        how = "with the same seeds" if behind.is_paired else f"over {_seeds(best)} and {_seeds(second)}"
        interval = f"95 % interval {behind.low:.3f} to {behind.high:.3f} {how}"
        if behind.is_clear:
            return f"{ahead} ({interval}): more than the noise of seeds."
        return f"{ahead} ({interval}), which may be noise: run more seeds before you choose."


def compare(runs: Sequence[Run]) -> Comparison:
    """Return the comparison of some runs."""
    differing = differing_settings(runs)
    groups: dict[tuple[str, ...], list[int]] = {}
    kept = [key for key in differing if key != SEED]
    for index in range(len(runs)):
        groups.setdefault(tuple(differing[key][index] for key in kept), []).append(index)
    measure, sign, values = _results(runs)
    labels = _labels(runs, list(groups.values()), {key: differing[key] for key in kept})
    choices = [
        Choice(label, tuple(runs[i] for i in indices), tuple(values[i] for i in indices))
        for label, indices in zip(labels, groups.values(), strict=True)
    ]
    choices.sort(key=lambda choice: (choice.mean is None, -sign * (choice.mean or 0.0)))
    largest = LARGEST.get(measure, math.inf)
    behind = (None, *(_behind(choices[0], choice, sign, largest) for choice in choices[1:]))
    return Comparison(measure, sign, tuple(choices), behind, differing)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs, with the value in each."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if not NO_CHOICE.match(key))
    values = {key: [_shown(run.settings[key]) if key in run.settings else "-" for run in runs] for key in keys}
    differing = {key: each for key, each in values.items() if len(set(each)) > 1}
    # The options of a policy loss are there twice: as they are set, and in the loss that they became part of.
    return {
        key: each
        for key, each in differing.items()
        if not (key.startswith(PART_OF_LOSS) and differing.get(_as_set(key)) == each)
    }


def _as_set(key: str) -> str:
    """Return the key that sets an option of the policy loss, given that of the loss."""
    return f"policy_loss.{key.removeprefix(PART_OF_LOSS)}"


def _shown(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return str(value)


def _results(runs: Sequence[Run]) -> tuple[str, float, list[float | None]]:
    """Return what is compared, its sign and its value of each run."""
    for key, (name, sign) in MEASURES.items():
        values = [run.summary.get(key) for run in runs]
        if any(value is not None for value in values):
            return name, sign, values
    rewards = [[row["reward"] for row in run.main if row.get("reward") is not None][-LAST:] for run in runs]
    return f"mean reward of the last {LAST} steps", 1.0, [fmean(each) if each else None for each in rewards]


def _behind(best: Choice, other: Choice, sign: float, largest: float) -> Difference | None:
    first, second = best.known, other.known
    if not first or not second:
        return None
    seeds = [
        [run.seed for run, value in zip(each.runs, each.values, strict=True) if value is not None]
        for each in (best, other)
    ]
    is_paired = len(first) > 1 and len(set(seeds[0])) == len(first) and set(seeds[0]) == set(seeds[1])
    if is_paired:
        of_seed = dict(zip(seeds[1], second, strict=True))
        second = [of_seed[seed] for seed in seeds[0]]
    interval = difference([sign * value for value in first], [sign * value for value in second], is_paired=is_paired)
    return interval and replace(interval, low=max(interval.low, -largest), high=min(interval.high, largest))


def _labels(runs: Sequence[Run], groups: Sequence[Sequence[int]], differing: dict[str, list[str]]) -> list[str]:
    """Return what tells each group from the others: its overrides, where they do, else its settings."""
    firsts = [group[0] for group in groups]
    chosen = [
        [each for each in runs[i].overrides if not NO_CHOICE.match(each) and not each.startswith(f"{SEED}=")]
        for i in firsts
    ]
    if len(groups) == 1:
        return [" ".join(map(_readable, chosen[0])) or "no override"]
    common = set.intersection(*map(set, chosen))
    overrides = [[each for each in of_choice if each not in common] for of_choice in chosen]
    for written in (map(_readable, each) for each in overrides), overrides:
        labels = [" ".join(each) or "no override" for each in written]
        if len(set(labels)) == len(labels):
            return labels
    return [", ".join(f"{key}={values[i]}" for key, values in differing.items()) for i in firsts]


def _readable(override: str) -> str:
    """Return an override with a drawn number such as 0.00037671376717424864 in four digits."""
    key, _, value = override.partition("=")
    try:
        short = f"{float(value):.4g}"
    except ValueError:
        return override
    return f"{key}={short}" if len(short) < len(value) else override


def _seeds(choice: Choice) -> str:
    return f"{len(choice.known)} seed{'s' if len(choice.known) != 1 else ''}"
