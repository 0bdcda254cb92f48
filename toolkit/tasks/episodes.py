"""Episodes of several turns: what the policy wrote, what it read between, and the calls of the environment.

No torch here.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.errors import ConfigError
from toolkit.tasks.base import Example
from toolkit.tasks.calls import Failure, call_each, call_together
from toolkit.tasks.environment import Reply, Step, checked_reply
from toolkit.tasks.workers import Workers

logger = logging.getLogger(__name__)

End = Literal["done", "max_turns", "context", "cut", "failed"]
"""How an episode ended: the environment said so, there were enough turns, the model's context was full, its last turn
had the most tokens that a turn may have, or the environment failed."""


@dataclass
class Episode:
    """One episode, which grows turn by turn."""

    example: Example
    texts: list[str] = field(default_factory=list)
    """What the policy wrote in each turn, without special tokens."""
    observations: list[str] = field(default_factory=list)
    """What it read between two turns: for chat messages, their contents."""
    rewards: list[float | None] = field(default_factory=list)
    """Of each turn; None: it has none."""
    end: End | None = None
    """None: it goes on."""
    failure: Failure | None = None
    instance: Any = None
    """Of the environment's class."""

    @property
    def turn_rewards(self) -> list[float]:
        """The rewards of its turns, 0 for those without; all 0 if the environment failed."""
        return [0.0 if self.failure or reward is None else reward for reward in self.rewards]

    @property
    def reward(self) -> float:
        """The sum of the rewards of its turns."""
        return sum(self.turn_rewards)

    @property
    def so_far(self) -> dict[str, Any]:
        """What environments and rewards get of it, by the names in `OF_EPISODE`; copies."""
        return {"turns": list(self.texts), "observations": list(self.observations)}

    @property
    def transcript(self) -> str:
        """All that was written and read after the prompt, without special tokens."""
        between = [*self.observations, *([""] * (len(self.texts) - len(self.observations)))]
        return "".join(text + read for text, read in zip(self.texts, between, strict=True))


@dataclass(frozen=True)
class Turn:
    """What the environment gets besides the example: the newest turn of an episode."""

    episode: Episode
    num_tokens: int
    finished: bool
    """Whether the turn ended by itself."""


class Environment:
    """The environment of a run: a user's step, called for every episode that goes on."""

    def __init__(
        self, step: Step, *, max_turns: int, timeout_s: float, num_workers: int, columns: Collection[str]
    ) -> None:
        """Take a loaded step.

        Args:
            step: as `toolkit.tasks.environment.load_environment` returns it.
            max_turns: of an episode.
            timeout_s: seconds for a call.
            num_workers: processes that call it; 0: called here.
            columns: names that the data has.

        Raises:
            ConfigError: a class is to be called in worker processes.
        """
        if step.is_class and num_workers:
            raise ConfigError(
                f"task.environment={step.spec} is a class, whose instances stay in the training process; set "
                "task.reward_workers=0, or make it a function of its arguments"
            )
        self.step_function, self.max_turns, self.timeout_s, self.columns = step, max_turns, timeout_s, list(columns)
        self._has_shown = False
        called_elsewhere = num_workers > 0 and not step.is_async
        self._workers = (
            Workers(num_workers, step.spec, self.columns, [], kind="environment") if called_elsewhere else None
        )

    @property
    def spec(self) -> str:
        """The environment as it was written."""
        return self.step_function.spec

    def step(self, turns: Sequence[Turn]) -> list[Reply | Failure]:
        """Return what the environment answers to each turn; the first failure of the run is logged."""
        self._start([turn.episode for turn in turns])
        ready = [turn for turn in turns if not isinstance(turn.episode.instance, Failure)]
        calls = [self.step_function.arguments(self._arguments(turn)) for turn in ready]
        answers = iter(self._called(calls, [turn.episode.instance for turn in ready]))
        replies: list[Reply | Failure] = []
        for turn in turns:
            instance = turn.episode.instance
            replies.append(instance if isinstance(instance, Failure) else next(answers))
        self._show(replies)
        return replies

    def _start(self, episodes: Sequence[Episode]) -> None:
        """Make an instance of the environment's class for each new episode."""
        step = self.step_function
        if not step.is_class:
            return
        new = [episode for episode in episodes if episode.instance is None]
        calls = [step.arguments(self._of_example(episode.example), at_start=True) for episode in new]
        for episode, instance in zip(new, call_each(step.function, calls, self.timeout_s), strict=True):
            episode.instance = instance

    def _called(self, calls: list[dict[str, Any]], instances: list[Any]) -> list[Reply | Failure]:
        step = self.step_function
        if self._workers is not None:
            return self._workers.call_each(calls, self.timeout_s)
        if not step.is_class:
            function, pairs = step.function, calls
        else:
            function = _async_step if step.is_async else _step
            pairs = [{"instance": one, "arguments": call} for one, call in zip(instances, calls, strict=True)]
        results = (call_together if step.is_async else call_each)(function, pairs, self.timeout_s)
        return [result if isinstance(result, Failure) else checked_reply(result) for result in results]

    def _of_example(self, example: Example) -> dict[str, Any]:
        """Return what is known before the first turn; copies, because an environment may change what it gets."""
        return {
            **dict.fromkeys(self.columns),  # None where a row lacks a column
            **({"answer": example.answer} if example.answer else {}),
            **copy.deepcopy(dict(example.columns)),
            "prompt": copy.deepcopy(example.prompt if example.source is None else example.source),
        }

    def _arguments(self, turn: Turn) -> dict[str, Any]:
        episode = turn.episode
        return {
            **self._of_example(episode.example),
            "completion": episode.texts[-1],
            "turn": len(episode.texts),
            "num_tokens": turn.num_tokens,
            "finished": turn.finished,
            **episode.so_far,
        }

    def _show(self, replies: Sequence[Reply | Failure]) -> None:
        """Log the first failure of the run with its traceback; later ones are only counted."""
        failure = next((reply for reply in replies if isinstance(reply, Failure)), None)
        if failure is not None and not self._has_shown:
            self._has_shown = True
            logger.warning(
                "environment %r failed, which ends an episode with reward 0: %s (metric environment_failures counts "
                "them)%s",
                self.spec,
                failure.reason,
                f"\n{failure.traceback.rstrip()}" if failure.traceback else "",
            )

    def close(self) -> None:
        """End worker processes."""
        if self._workers is not None:
            self._workers.close()


def _step(instance: Any, arguments: dict[str, Any]) -> Any:
    return instance.step(**arguments)


async def _async_step(instance: Any, arguments: dict[str, Any]) -> Any:
    return await instance.step(**arguments)
