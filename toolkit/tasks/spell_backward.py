"""Spelling words backward, from reasoning-gym."""

from __future__ import annotations

import string
from random import Random

import reasoning_gym

from toolkit.errors import ConfigError
from toolkit.tasks.base import Example, Task

POOL_SIZE = 12_000
"""Draws from reasoning-gym's word list; they hold about 4,500 different words of four letters."""


class SpellBackward(Task):
    """``word=`` is to be continued with ``drow`` and the end of the text.

    Demonstrations are random letters, not words: a small model shown words learns which letters follow each other
    in English instead of where each letter goes, and RL then never samples the right answer for some words (held-out
    accuracy stopped at 0.67 to 0.91; after random letters it passes 0.99).
    """

    alphabet = string.ascii_lowercase + "="

    def __init__(
        self,
        seed: int,
        *,
        word_length: int,
        num_heldout: int,
        demonstrated_length: int | None = None,
        partial_credit: bool = False,
    ) -> None:
        self._length, self._demonstrated = word_length, demonstrated_length or word_length
        self._gives_part = partial_credit
        self._dataset = reasoning_gym.create_dataset(
            "spell_backward", size=POOL_SIZE, seed=seed, min_word_len=self._length, max_word_len=self._length
        )
        examples: dict[str, Example] = {}
        for index in range(POOL_SIZE):
            entry = self._dataset[index]
            word = entry["metadata"]["word"].lower()
            if set(word) <= set(string.ascii_lowercase):
                examples.setdefault(word, Example(f"{word}=", entry["answer"].lower(), entry))
        pool = list(examples.values())
        Random(seed).shuffle(pool)
        if len(pool) <= num_heldout:
            raise ConfigError(
                f"task.num_heldout={num_heldout} leaves no words for RL: there are {len(pool)} of "
                f"{self._length} letters"
            )
        self.heldout = pool[:num_heldout]
        self.train = pool[num_heldout:]
        self._kept_back = {example.prompt for example in self.heldout}

    def score(self, example: Example, completion: str) -> float:
        """Return 1.0 for the exact answer, else 0.0 or, if asked to, the share of letters in their place.

        The partial credit of reasoning-gym is another one: it does not look at places.
        """
        if self._gives_part:
            right = sum(mine == theirs for mine, theirs in zip(completion, example.answer, strict=False))
            return right / max(len(completion), len(example.answer))
        return float(self._dataset.score_answer(completion, example.entry) >= 1.0)

    def demonstrate(self, number: int, rng: Random) -> list[Example]:
        """Return random letters spelt backward, of the demonstrated length; held-out words never come up."""
        examples: list[Example] = []
        while len(examples) < number:
            word = "".join(rng.choices(string.ascii_lowercase, k=self._demonstrated))
            if f"{word}=" not in self._kept_back:
                answer = word[::-1]
                examples.append(Example(f"{word}=", answer, {"answer": answer}))
        return examples
