"""A task of a user's rows: turned into what the model sees when its tokenizer is there. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from toolkit.errors import ConfigError
from toolkit.tasks import chat, split
from toolkit.tasks.base import Example, Task
from toolkit.tasks.records import Problems
from toolkit.tasks.rows import Row, Source, load, note

USUAL_COMPLETION = 256
"""Tokens of a completion, if ``rollout.max_new_tokens`` does not say and the model's context has twice as many."""


@dataclass(frozen=True)
class Rendering:
    """How rows become what the model sees."""

    name: str = "task"
    """Of the data, for messages."""
    skip_bad: bool = False
    """Leave out rows that do not fit instead of raising."""
    tools_column: str = "tools"
    with_completions: bool = False
    """Whether rows are for supervised learning: then the completion must fit, too."""


RENDERING = Rendering()


class TextTask(Task):
    """Prompts in natural language. Training goes through them in epochs, each in another order."""

    def __init__(
        self, seed: int, *, train: Sequence[Row], heldout: Sequence[Row], rendering: Rendering = RENDERING
    ) -> None:
        self._seed, self._rendering = seed, rendering
        self._rows = list(train), list(heldout)
        self.train, self.heldout = ([_plain_example(row) for row in rows] for rows in self._rows)
        values = [value for rows in self._rows for row in rows for value in row.columns.values()]
        texts = [example.prompt + example.answer for example in (*self.train, *self.heldout)]
        self.alphabet = "".join(sorted({letter for text in (*texts, *map(str, values)) for letter in text}))

    def demonstrate(self, number: int, rng: Random) -> list[Example]:
        """Return training rows that have something to imitate.

        Raises:
            ConfigError: none has.
        """
        pool = self._demonstrations
        return rng.sample(pool, number) if number <= len(pool) else rng.choices(pool, k=number)

    def draw_at(self, step: int, number: int, rng: Random) -> list[Example]:
        """Return the rows of a step, in epochs."""
        return self._in_epochs(self.train, step, number)

    def demonstrate_at(self, step: int, number: int, rng: Random) -> list[Example]:
        """Return the demonstrations of a step, in epochs."""
        return self._in_epochs(self._demonstrations, step, number)

    @property
    def _demonstrations(self) -> list[Example]:
        pool = [example for example in self.train if example.segments]
        if not pool:
            raise ConfigError(f"{self._rendering.name}: no row has a completion to imitate")
        return pool

    def _in_epochs(self, pool: Sequence[Example], step: int, number: int) -> list[Example]:
        chosen: list[Example] = []
        orders: dict[int, list[int]] = {}
        for position in range(step * number, (step + 1) * number):
            epoch, index = divmod(position, len(pool))
            if epoch not in orders:
                orders[epoch] = list(range(len(pool)))
                Random(f"{self._seed}/epoch/{epoch}").shuffle(orders[epoch])
            chosen.append(pool[orders[epoch][index]])
        return chosen

    def longest_completion(self, context: int | None) -> int:
        """Return 256 tokens, or half the model's context if that is less."""
        return USUAL_COMPLETION if context is None else max(1, min(USUAL_COMPLETION, context // 2))

    def prepare(self, tokenizer: Any, *, context: int | None, max_new_tokens: int | None) -> None:
        """Apply the chat template or the start of a text, and check lengths.

        Raises:
            ConfigError: the tokenizer lacks a template, an eos or a pad token, or a row does not fit.
        """
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no eos token, so a completion cannot end; set it and save the tokenizer again: "
                "tokenizer.eos_token = ..."
            )
        if tokenizer.pad_token_id is None:
            raise ConfigError("the tokenizer has no pad token; set it: tokenizer.pad_token = tokenizer.eos_token")
        if any(isinstance(row.prompt, list) for rows in self._rows for row in rows):
            chat.check_template(tokenizer, self._rendering.name)
        new = max_new_tokens or self.longest_completion(context)
        problems = Problems(skip=self._rendering.skip_bad)
        start = chat.start_of_text(tokenizer)
        sides = []
        for rows in self._rows:
            rendered = [(row, _rendered(row, tokenizer, start, self._rendering, problems)) for row in rows]
            sides.append(_fitting(rendered, tokenizer, context, new, problems, self._rendering.with_completions))
        problems.check(note)
        self.train, self.heldout = sides
        if not self.train:
            raise ConfigError(f"{self._rendering.name}: every row was skipped; no row is left to train on")


class DatasetTask(TextTask):
    """A user's rows; its rewards are functions."""

    def __init__(self, source: Source, seed: int) -> None:
        loaded = load(source, seed)
        rendering = Rendering(
            name=f"task.path={source.path}",
            skip_bad=source.on_bad_row == "skip",
            tools_column=source.tools_column,
            with_completions=source.with_completions,
        )
        super().__init__(seed, train=loaded.train, heldout=loaded.heldout, rendering=rendering)

    def score(self, example: Example, completion: str) -> float:
        """Raise: data has no verifier."""
        raise ConfigError("a task of your data has no verifier; name a reward with task.reward")


def _plain_example(row: Row) -> Example:
    prompt = row.prompt if isinstance(row.prompt, str) else split.content_of(row.prompt)
    completion = row.completion if isinstance(row.completion, str) else ""
    return Example(prompt, completion or str(row.columns.get("answer", "")), row.entry, row.prompt, row.columns)


def _rendered(row: Row, tokenizer: Any, start: str, rendering: Rendering, problems: Problems) -> Example | None:
    """Return a row as the model sees it; None if the template does not accept it."""
    example = _plain_example(row)
    if isinstance(row.prompt, str):
        prompt = start + row.prompt
        if isinstance(row.completion, list):
            problems.add(row.where, "its completion is chat messages but its prompt is text; give both in one form")
            return None
        pieces = () if row.completion is None else ((prompt, False), (row.completion, True))
        return replace(example, prompt=prompt, segments=pieces)
    tools = row.columns.get(rendering.tools_column)
    try:
        prompt = chat.rendered(tokenizer, row.prompt, tools)
        if tools and prompt == chat.rendered(tokenizer, row.prompt):
            note("the chat template does not show the tools of the data to the model")
        if row.completion is None:
            return replace(example, prompt=prompt)
        is_text = isinstance(row.completion, str)
        answer = [{"role": "assistant", "content": row.completion}] if is_text else list(row.completion)
        segments = tuple(chat.turns_of(tokenizer, [*row.prompt, *answer], tools))
    except ValueError as error:
        problems.add(row.where, str(error))
        return None
    return replace(example, prompt=prompt, segments=segments)


def _fitting(
    rendered: Sequence[tuple[Row, Example | None]],
    tokenizer: Any,
    context: int | None,
    new: int,
    problems: Problems,
    with_completions: bool,
) -> list[Example]:
    """Return the examples whose tokens the model can read; the others are problems."""
    pairs = [(row, example) for row, example in rendered if example is not None]
    examples = []
    lengths = _lengths([example.prompt for _, example in pairs], tokenizer)
    _say_what_is_unknown(pairs, tokenizer)
    totals = _lengths(["".join(text for text, _ in example.segments) for _, example in pairs], tokenizer)
    for (row, example), length, total in zip(pairs, lengths, totals, strict=True):
        if length == 0:
            problems.add(row.where, "its prompt has no token")
        elif with_completions and context is not None and total + 1 > context:
            problems.add(row.where, f"it has {total + 1} tokens with its end, but the model reads {context}")
        elif not with_completions and context is not None and length + new > context:
            problems.add(
                row.where,
                f"its prompt has {length} tokens, which with {new} of the completion is more than the {context} that "
                "the model reads; shorten it or lower rollout.max_new_tokens",
            )
        else:
            is_long = context is not None and total + 1 > context  # to imitate, but its prompt can be used
            examples.append(replace(example, segments=()) if is_long else example)
    return examples


def _say_what_is_unknown(pairs: Sequence[tuple[Row, Example]], tokenizer: Any) -> None:
    """Note prompts that the tokenizer cannot write, as one of another language or of characters."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown == tokenizer.eos_token_id or not pairs:  # GPT-2 has one token for both
        return
    ids = tokenizer([example.prompt for _, example in pairs], add_special_tokens=False)["input_ids"]
    lacking = [row.where for (row, _), tokens in zip(pairs, ids, strict=True) if unknown in tokens]
    if lacking:
        note(
            f"{len(lacking)} of {len(pairs)} prompts have characters that the tokenizer does not know "
            f"({tokenizer.unk_token}); the first is {lacking[0]}"
        )


def _lengths(texts: Sequence[str], tokenizer: Any) -> list[int]:
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"]]
