"""All rewards of a run together: each completion's total, its parts by name, and what went wrong. No torch here.

With an environment a completion is an episode: the rewards of its turns are one more reward.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from toolkit.tasks.base import Example, Task
from toolkit.tasks.calls import Failure, Value, call, call_each, call_together, checked_list, checked_value
from toolkit.tasks.episodes import Episode
from toolkit.tasks.rewards import Reward
from toolkit.tasks.workers import Workers

logger = logging.getLogger(__name__)

ENVIRONMENT = "environment"
"""Name of the reward that is the sum of the rewards of an episode's turns."""
UNKNOWN = math.nan
"""Reward of a completion that no reward applies to, and part that a completion does not have."""


@dataclass(frozen=True)
class Written:
    """A completion as rewards get it."""

    example: Example
    text: str
    finished: bool
    """Whether it ended by itself."""
    num_tokens: int
    seed: str
    """Of the coin flip, the same on every process."""
    episode: Episode | None = None
    """With an environment: its turns, of which `text` is the last."""


@dataclass(frozen=True)
class Scores:
    """Rewards of some completions, in their order."""

    totals: list[float]
    """The weighted sum of each; NaN where no reward applies."""
    parts: dict[str, list[float]] = field(default_factory=dict)
    """``name``, or ``name/part`` of a dict -> the values, NaN where it does not apply; without weights."""
    weights: dict[str, float] = field(default_factory=dict)
    """The same names -> the weight of each."""
    failures: list[tuple[str, Failure]] = field(default_factory=list)
    """Name of the reward, and why it gave none."""
    num_failed: int = 0
    """Completions with a reward that failed, or whose environment did."""


class RewardSet:
    """The rewards of a run, with their weights."""

    def __init__(
        self,
        rewards: Sequence[Reward],
        weights: Sequence[float] | None,
        *,
        timeout_s: float,
        num_workers: int,
        columns: Collection[str] = (),
        settings: dict[str, Any] | None = None,
    ) -> None:
        """Take loaded rewards.

        Args:
            rewards: as `toolkit.tasks.rewards.load_rewards` returns them.
            weights: of each; None: 1.
            timeout_s: seconds for a call.
            num_workers: processes that call the functions; 0: they are called here, all but `math_verify`.
            columns: names that the data has.
            settings: further arguments of built-in rewards; columns of the data replace them.
        """
        self.rewards = list(rewards)
        self.weights = dict(zip([r.name for r in rewards], weights or [1.0] * len(rewards), strict=True))
        self.timeout_s = timeout_s
        self.columns, self.settings = list(columns), dict(settings or {})
        self._has_shown = self._has_warned = False
        self._workers = {
            reward.name: Workers(number, reward.spec, self.columns, list(self.settings))
            for reward in rewards
            if (number := max(num_workers, int(reward.spec == "math_verify"))) > 0
            and reward.function is not None
            and not reward.is_async
        }

    @property
    def has_functions(self) -> bool:
        """Whether there is a reward besides verifier and coin flip."""
        return any(reward.function is not None for reward in self.rewards)

    def score(self, task: Task, written: Sequence[Written], *, by_verifier: bool = False) -> Scores:
        """Return the rewards of completions.

        Args:
            task: whose verifier is asked.
            written: the completions.
            by_verifier: ask the verifier where coins would be flipped: to measure what the control has learnt.
        """
        totals, parts, weights = [UNKNOWN] * len(written), dict[str, list[float]](), dict[str, float]()
        failures: list[tuple[str, Failure]] = []
        has_failed = [False] * len(written)
        asked = [index for index, each in enumerate(written) if each.episode is None or not each.episode.failure]

        def add(index: int, name: str, weight: float, number: float) -> None:
            parts.setdefault(name, [UNKNOWN] * len(written))[index] = number
            weights[name] = weight
            before = totals[index]
            totals[index] = weight * number + (0.0 if math.isnan(before) else before)

        for reward in self.rewards:
            values = self._values(reward, task, [written[index] for index in asked], by_verifier)
            for index, value in zip(asked, values, strict=True):
                if isinstance(value, Failure):
                    failures.append((reward.name, value))
                    has_failed[index] = True
                    value = 0.0
                for part, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if number is None:
                        continue
                    add(index, f"{reward.name}/{part}" if part else reward.name, self.weights[reward.name], number)
        self._show(failures)
        for index, each in enumerate(written):
            if each.episode is None:
                continue
            if each.episode.failure is not None:  # no reward has been asked: it would judge half an episode
                failures.append((ENVIRONMENT, each.episode.failure))
                has_failed[index] = True
            # Also 0: an environment that rewards at the end must not leave out episodes that never get there.
            add(index, ENVIRONMENT, 1.0, each.episode.reward)
        if totals and all(map(math.isnan, totals)) and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "no reward applies to any of %d completions: all returned None; did you forget return?", len(totals)
            )
        return Scores(totals, parts, weights, failures, sum(has_failed))

    def _values(
        self, reward: Reward, task: Task, written: Sequence[Written], by_verifier: bool
    ) -> Sequence[Value | Failure]:
        if reward.spec == "coin_flip" and not by_verifier:
            return [float(Random(each.seed).random() < 0.5) for each in written]
        if reward.function is None:
            return [task.reward(each.example, each.text, finished=each.finished) for each in written]
        if reward.is_batched:
            return self._batch(reward, written)
        calls = [reward.arguments(self._arguments_of(each, reward)) for each in written]
        if reward.is_async:
            return [_checked(result) for result in call_together(reward.function, calls, self.timeout_s)]
        workers = self._workers.get(reward.name)
        if workers is not None:
            return workers.call_each(calls, self.timeout_s)
        return [_checked(result) for result in call_each(reward.function, calls, self.timeout_s)]

    def _arguments_of(self, each: Written, reward: Reward) -> dict[str, Any]:
        """Return what rewards can get, with copies of the row's columns that this one takes: it may change them."""
        prompt = each.example.prompt if each.example.source is None else each.example.source
        return {
            **dict.fromkeys(self.columns),  # None where a row lacks a column
            **self.settings,
            **({"answer": each.example.answer} if each.example.answer else {}),
            **copy.deepcopy(reward.arguments(each.example.columns)),
            "prompt": copy.deepcopy(prompt),
            "completion": each.text,
            "num_tokens": each.num_tokens,
            "finished": each.finished,
            **(each.episode.so_far if each.episode else {}),
        }

    def _batch(self, reward: Reward, written: Sequence[Written]) -> Sequence[Value | Failure]:
        if not written:
            return []
        rows = [self._arguments_of(each, reward) for each in written]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        columns |= {"prompts": columns.pop("prompt"), "completions": columns.pop("completion")}
        columns |= {name: value for name, value in self.settings.items() if name not in self.columns}
        assert reward.function is not None
        arguments = reward.arguments(columns)
        workers = self._workers.get(reward.name)
        if workers is not None:
            (results,) = workers.call_each([arguments], self.timeout_s)
        elif reward.is_async:
            (results,) = call_together(reward.function, [arguments], self.timeout_s)
        else:
            results = call(reward.function, arguments, self.timeout_s)
        return [results] * len(written) if isinstance(results, Failure) else checked_list(results, len(written))

    def _show(self, failures: Sequence[tuple[str, Failure]]) -> None:
        """Log the first failure of the run with its traceback; later ones are only counted."""
        if failures and not self._has_shown:
            self._has_shown = True
            name, failure = failures[0]
            logger.warning(
                "reward %r failed and scores 0: %s (metric reward_failures counts them)%s",
                name,
                failure.reason,
                f"\n{failure.traceback.rstrip()}" if failure.traceback else "",
            )

    def close(self) -> None:
        """End the worker processes."""
        for workers in self._workers.values():
            workers.close()


def _checked(result: Any) -> Value | Failure:
    return result if isinstance(result, Failure) else checked_value(result)
