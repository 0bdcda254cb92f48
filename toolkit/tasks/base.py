"""The interface of tasks to the training loop. A custom task is one subclass and one config."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A prompt and what its verifier needs."""

    prompt: str
    """The text that the model sees, special tokens included."""
    answer: str
    """The reference answer; RL never shows it to the policy. Empty if there is none."""
    entry: Any = None
    """Any other data for the verifier."""
    source: Any = None
    """The prompt as rewards get it: a text, or chat messages; None: `prompt`."""
    columns: Mapping[str, Any] = field(default_factory=dict)
    """What rewards get as keyword arguments."""
    segments: tuple[tuple[str, bool], ...] = ()
    """A demonstration as pieces of text, each with whether it is scored; empty: `prompt`, and `answer` scored."""


class Task(ABC):
    """Prompts to learn from, others to measure with, demonstrations, and a verifier."""

    train: Sequence[Example]
    """Examples whose prompts RL uses; it never sees their answers."""
    heldout: Sequence[Example]
    """Examples that only measure the policy; none of them is in `train` or demonstrated."""
    alphabet: str
    """Every character of prompts and answers."""
    _has_failed = False

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
            level = logging.DEBUG if self._has_failed else logging.WARNING
            logger.log(level, "the verifier failed on %r; reward 0", completion, exc_info=True)
            self._has_failed = True
            return 0.0

    @abstractmethod
    def demonstrate(self, number: int, rng: Random) -> list[Example]:
        """Return examples whose answers supervised learning may see; the same for the same `rng`."""

    def draw(self, number: int, rng: Random) -> list[Example]:
        """Return training examples, the same for the same `rng`; override it to prefer some over others."""
        pool = list(self.train)
        return rng.sample(pool, number) if number <= len(pool) else rng.choices(pool, k=number)

    def draw_at(self, step: int, number: int, rng: Random) -> list[Example]:
        """Return the training examples of a step; by default drawn anew in each."""
        return self.draw(number, rng)

    def demonstrate_at(self, step: int, number: int, rng: Random) -> list[Example]:
        """Return the demonstrations of a step; by default drawn anew in each."""
        return self.demonstrate(number, rng)

    def prepare(self, tokenizer: Any, *, context: int | None, max_new_tokens: int | None) -> None:  # noqa: B027
        """Turn the examples into what the model sees, and check that it fits; by default they are already.

        Args:
            tokenizer: of the model.
            context: most tokens that the model reads; None: not known.
            max_new_tokens: longest completion; None: as long as `longest_completion` says.
        """

    def longest_completion(self, context: int | None) -> int:
        """Return where completions are cut, in tokens, if ``rollout.max_new_tokens`` does not say."""
        return self.longest_answer + 1  # the end of the text is a token

    @property
    def longest_answer(self) -> int:
        """Characters of the longest answer."""
        return max(len(example.answer) for example in (*self.train, *self.heldout))
