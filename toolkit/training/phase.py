"""A sequence of optimizer steps, and its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from toolkit.training.config import SchedulerConfig


@dataclass
class Phase:
    """A sequence of steps with one optimizer and one learning-rate schedule."""

    name: str
    num_steps: int
    step_fn: Callable[[Phase], dict[str, float]]
    optimizer: Any
    learning_rate: Callable[[int], float]
    """Of the update with this number, from 0."""
    next_step: int = 0
    num_updates: int = 0


def learning_rate_schedule(config: SchedulerConfig, peak: float, num_updates: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the update, from 0 to num_updates - 1."""

    def learning_rate(update: int) -> float:
        rise = min(1.0, (update + 1) / max(config.warmup_updates, 1))
        done = min(update / max(num_updates, 1), 1.0)
        left = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[config.shape]
        floor = 1.0 if config.shape == "constant" else config.final_ratio
        return peak * rise * (floor + (1 - floor) * left)

    return learning_rate
