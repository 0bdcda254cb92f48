"""The interface of tasks to the training loop. A custom task is one subclass and one config."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A prompt and what its verifier needs."""

    prompt: str
    answer: str
    """The reference answer; RL never shows it to the policy."""
    entry: Any = None
    """Any other data for the verifier."""


class Task(ABC):
    """Prompts to learn from, others to measure with, demonstrations, and a verifier."""

    train: Sequence[Example]
    """Examples whose prompts RL uses; it never sees their answers."""
    heldout: Sequence[Example]
    """Examples that only measure accuracy; none of them is in `train` or demonstrated."""
    alphabet: str
    """Every character of prompts and answers."""

    @abstractmethod
    def score(self, example: Example, completion: str) -> float:
        """Return the verifier's reward of a finished completion, 1.0 for a right one."""

    def reward(self, example: Example, completion: str, *, finished: bool) -> float:
        """Return the reward of a completion; 0 if it never ended, or if the verifier raises."""
        if not finished:
            return 0.0
        try:
            return float(self.score(example, completion))
        except Exception:  # a verifier meets every kind of text; its crash must not end the run
            logger.warning("the verifier failed on %r; reward 0", completion, exc_info=True)
            return 0.0

    @abstractmethod
    def demonstrate(self, number: int, rng: Random) -> list[Example]:
        """Return examples whose answers supervised learning may see; the same for the same `rng`."""

    def draw(self, number: int, rng: Random) -> list[Example]:
        """Return training examples, the same for the same `rng`; override it to prefer some over others."""
        pool = list(self.train)
        return rng.sample(pool, number) if number <= len(pool) else rng.choices(pool, k=number)

    @property
    def longest_answer(self) -> int:
        """Characters of the longest answer."""
        return max(len(example.answer) for example in (*self.train, *self.heldout))
