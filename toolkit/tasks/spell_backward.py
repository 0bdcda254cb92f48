"""Spelling words backward, from reasoning-gym."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from random import Random

import reasoning_gym

from toolkit.errors import ConfigError
from toolkit.tasks.base import Example, Task
from toolkit.tasks.config import SpellBackwardConfig

POOL_SIZE = 12_000
"""Draws from reasoning-gym's word list; it holds about 4,400 different words of four letters."""


class SpellBackward(Task):
    """``word=`` is to be continued with ``drow`` and the end of the text.

    Words with rare letters are drawn more often, so that a few hundred steps show every letter often enough.
    """

    alphabet = string.ascii_lowercase + string.digits + "="

    def __init__(self, config: SpellBackwardConfig, seed: int) -> None:
        length = config.word_length
        self._dataset = reasoning_gym.create_dataset(
            "spell_backward", size=POOL_SIZE, seed=seed, min_word_len=length, max_word_len=length
        )
        examples: dict[str, Example] = {}
        for index in range(POOL_SIZE):
            entry = self._dataset[index]
            word = entry["metadata"]["word"].lower()
            if set(word) <= set(self.alphabet):
                examples.setdefault(word, Example(f"{word}=", entry["answer"].lower(), entry))
        pool = list(examples.values())
        Random(seed).shuffle(pool)
        labelled = config.num_heldout + config.num_warmup
        if len(pool) <= labelled:
            raise ConfigError(
                f"task.num_heldout + task.num_warmup = {labelled} leaves no words for RL: there are {len(pool)} of "
                f"length {length}"
            )
        self.heldout = pool[: config.num_heldout]
        self.warmup = pool[config.num_heldout : labelled]
        self.train = pool[labelled:]
        self._frequency = Counter(letter for example in self.warmup for letter in set(example.answer))

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 for the exact answer and 0.0 otherwise (reasoning-gym gives partial credit below 1)."""
        return float(self._dataset.score_answer(completion, example.entry) >= 1.0)

    def draw(self, examples: Sequence[Example], number: int, rng: Random) -> list[Example]:
        """Draw with weight sum(1 / frequency of the letter)."""
        weights = accumulate(
            sum(1 / max(self._frequency[letter], 1) for letter in example.answer) for example in examples
        )
        return rng.choices(list(examples), cum_weights=list(weights), k=number)
