"""The policy losses again, one token at a time in Python's own floats, written from the papers' formulas.

Where a formula has sg(.), no gradient, the reference reads the frozen copy of the log-probabilities; differences of the
losses while only the live ones move are then the gradient.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Losses = list[float]
LogProbs = Sequence[float]


@dataclass(frozen=True)
class Sample:
    """Tokens of some sequences, side by side; everything is one number per token."""

    logprobs: list[float]
    old: list[float]
    rollout: list[float]
    teacher: list[float]
    advantages: list[float]
    sequences: list[int]
    turns: list[int]
    groups: list[int]
    positions: list[int]
    log_ratio_range: tuple[float | None, float | None] = (-20.0, 20.0)

    def anchor(self, name: str) -> list[float]:
        return {"old": self.old, "rollout": self.rollout, "self": self.logprobs}[name]

    def bound(self, log_ratio: float) -> float:
        low, high = self.log_ratio_range
        log_ratio = log_ratio if low is None else max(low, log_ratio)
        return log_ratio if high is None else min(high, log_ratio)

    def members(self, token: int) -> list[int]:
        """The tokens of a token's own sequence."""
        return [k for k, sequence in enumerate(self.sequences) if sequence == self.sequences[token]]


def made_up(seed: int, lengths: Sequence[int], spread: float, log_ratio_range: Any = (-20.0, 20.0)) -> Sample:
    """Draw a sample whose ratios are about exp(spread), with holes, turns, groups and some advantages of 0."""
    draw = random.Random(seed)
    columns: dict[str, list[Any]] = {name: [] for name in Sample.__dataclass_fields__ if name != "log_ratio_range"}
    turn = -1
    for sequence, length in enumerate(lengths):
        own, position, turn = draw.gauss(0, 1), 0, turn + 1
        is_constant, is_idle = draw.random() < 0.5, draw.random() < 0.15
        for _ in range(length):
            if draw.random() < 0.25:  # tokens between that are not scored: a new turn
                position, turn = position + draw.randint(1, 3), turn + 1
            logprob = -abs(draw.gauss(0, 1.5))
            row = {
                "logprobs": logprob,
                "old": logprob + spread * draw.gauss(0, 1),
                "rollout": logprob + spread * draw.gauss(0, 1),
                "teacher": logprob + draw.gauss(0, 1),
                "advantages": 0.0 if is_idle else own if is_constant else draw.gauss(0, 1),
                "sequences": sequence,
                "turns": turn,
                "groups": sequence // 2,
                "positions": position,
            }
            for name, value in row.items():
                columns[name].append(value)
            position += 1
    return Sample(**columns, log_ratio_range=log_ratio_range)


def gradient(function: Callable[..., Losses], x: Sample, weights: Sequence[float], **options: Any) -> list[float]:
    """Central differences of the weighted sum of the losses; tokens that do not move cancel exactly."""
    step, grads = 1e-6, []
    for token in range(len(x.logprobs)):
        sides = []
        for sign in (1, -1):
            live = list(x.logprobs)
            live[token] += sign * step
            sides.append(function(x, live, **options))
        grads.append(sum(w * (up - down) for w, up, down in zip(weights, *sides, strict=True)) / (2 * step))
    return grads


# ---------------------------------------------------------------------- ratios


def log_ratios(x: Sample, live: LogProbs, anchor: str) -> list[float]:
    return [x.bound(new - old) for new, old in zip(live, x.anchor(anchor), strict=True)]


def ratios(x: Sample, live: LogProbs, anchor: str) -> list[float]:
    return [math.exp(value) for value in log_ratios(x, live, anchor)]


def over(labels: Sequence[int], values: Sequence[float], how: str) -> list[float]:
    """The sum or mean of the values with the same label, for each token."""
    found = []
    for label in labels:
        same = [value for value, other in zip(values, labels, strict=True) if other == label]
        found.append(sum(same) / (len(same) if how == "mean" else 1))
    return found


def level_ratios(x: Sample, live: LogProbs, anchor: str, labels: Sequence[int], how: str) -> list[float]:
    raw = [new - old for new, old in zip(live, x.anchor(anchor), strict=True)]
    return [math.exp(x.bound(value)) for value in over(labels, raw, how)]


def clipped(value: float, low: float | None, high: float | None) -> float:
    value = value if low is None else max(low, value)
    return value if high is None else min(high, value)


def ppo(r: float, a: float, low: float, high: float, c: float | None = None, delta: float | None = None) -> float:
    objective = min((r if delta is None else min(r, delta)) * a, clipped(r, 1 - low, 1 + high) * a)
    return -max(objective, c * a) if c is not None and a < 0 else -objective
