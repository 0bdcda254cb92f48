"""Any task of reasoning-gym, or a mixture of them, with its verifier; no torch here."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from toolkit.errors import ConfigError, did_you_mean, first_line
from toolkit.tasks.base import Example
from toolkit.tasks.chat import Message
from toolkit.tasks.dataset import Rendering, TextTask
from toolkit.tasks.rows import Row, with_system

LARGEST_SHARE = 0.5
"""Of the different prompts may be held out."""
SHOTS_DRAWN = 4
"""Examples drawn for each that is shown: small tasks repeat theirs."""


def with_shots(question: str, shots: Sequence[tuple[str, str]], *, as_chat: bool) -> str | list[Message]:
    """Return the question after solved examples: earlier turns of the chat, or text with a blank line between them."""
    if not shots:
        return question
    if as_chat:
        turns = [turn for shot in shots for turn in zip(("user", "assistant"), shot, strict=True)]
        return [{"role": role, "content": text} for role, text in (*turns, ("user", question))]
    return "".join(f"{shown}\n{answer}\n\n" for shown, answer in shots) + f"{question}\n"


def check_names(names: Sequence[str]) -> None:
    """Raise for a name that reasoning-gym does not have.

    Raises:
        ConfigError: it does not.
    """
    for name in names:
        if name not in DATASETS:
            raise ConfigError(
                f"task.name={name!r} is not a task of reasoning-gym{did_you_mean(name, DATASETS)}; it has "
                f"{len(DATASETS)}: {', '.join(sorted(DATASETS)[:6])}, ..."
            )


class ReasoningGym(TextTask):
    """Prompts of reasoning-gym, `size` for each of `names`, which are mixed in equal parts."""

    def __init__(
        self,
        seed: int,
        *,
        names: Sequence[str],
        size: int,
        num_heldout: int,
        options: Mapping[str, Any],
        as_chat: bool,
        system_prompt: str | None,
        num_shots: int = 0,
    ) -> None:
        check_names(names)
        self._datasets = {name: self._created(name, size, seed, options) for name in names}
        shots = {name: self._shots(name, num_shots, seed, options) for name in names}
        shown = {question for pairs in shots.values() for question, _ in pairs}
        rows: dict[str, Row] = {}
        for index in range(size):
            for name, dataset in self._datasets.items():
                entry = dataset[index]
                question = entry["question"]
                if question in shown:
                    continue
                prompt = with_shots(question, shots[name], as_chat=as_chat)
                prompt = with_system(prompt, as_chat=as_chat, system_prompt=system_prompt)
                columns = {"answer": str(entry["answer"]), "task": name}
                where = f"{name}, row {index + 1}"
                rows.setdefault(question, Row(prompt, columns["answer"], columns, where, (name, entry)))
        pool = list(rows.values())
        Random(seed).shuffle(pool)
        if num_heldout > LARGEST_SHARE * len(pool):
            raise ConfigError(
                f"task.num_heldout={num_heldout} of {len(pool)} different prompts leaves too few to train on; lower it "
                "to half of them or less, or raise task.size"
            )
        rendering = Rendering(name=f"task.name={', '.join(names)}")
        super().__init__(seed, train=pool[num_heldout:], heldout=pool[:num_heldout], rendering=rendering)
        self.alphabet = "".join(sorted({*string.printable, *self.alphabet}))

    @classmethod
    def _shots(cls, name: str, number: int, seed: int, options: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return different questions with their answers, of another seed than the prompts."""
        pairs: dict[str, str] = {}
        if number > 0:
            for entry in cls._created(name, SHOTS_DRAWN * number, seed + 1, options):
                pairs.setdefault(entry["question"], str(entry["answer"]))
        if len(pairs) < number:
            raise ConfigError(f"task.num_shots={number}: {name!r} has only {len(pairs)} different questions to show")
        return list(pairs.items())[:number]

    @staticmethod
    def _created(name: str, size: int, seed: int, options: Mapping[str, Any]) -> Any:
        try:
            return reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
        except (AssertionError, TypeError, ValueError) as error:
            raise ConfigError(f"task.options={dict(options)} do not fit {name!r}: {first_line(error)}") from None

    def score(self, example: Example, completion: str) -> float:
        """Return the verifier's score, 1.0 for a right answer; some tasks give partial credit."""
        name, entry = example.entry
        return float(self._datasets[name].score_answer(completion.strip(), entry))
