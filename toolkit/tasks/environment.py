"""The environment of a task with several turns: a user's function or class, and what it may return; no torch here.

It is ``step(prompt, completion, *, turn, **columns)``, called after each turn of an episode, or a class with such a
method, of which each episode has its own instance. Either may be async. It gets only the keyword arguments that its
signature accepts, and returns None when the episode is over, what the policy reads next (a text, or chat messages), or
a dict with ``observation``, ``reward`` and ``done``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.errors import ConfigError, a_type, did_you_mean, listed
from toolkit.tasks.calls import Failure, checked_number
from toolkit.tasks.chat import Message, wrong_with_messages
from toolkit.tasks.functions import Kind, is_async, load_function, named_parameters, never_returns, split_spec, yields

KIND = Kind(
    "task.environment",
    "step",
    "an environment is def step(prompt, completion, turn, **columns), or a class with such a method",
    may_be_class=True,
)
"""What `toolkit.tasks.functions` says of an environment."""
OF_EPISODE = ("turns", "observations")
"""What environments and rewards get of an episode: the texts of its turns so far, and what was read between them."""
OF_TURN = ("prompt", "completion", "turn", "num_tokens", "finished", *OF_EPISODE)
"""Arguments of a step besides columns: `turn` counts from 1, and `completion` is the text of this turn."""
PARTS = ("observation", "reward", "done")
"""Keys of a dict that a step returns."""
OTHER_NAMES = {
    "obs": "observation",
    "environment_feedback": "observation",
    "text": "observation",
    "score": "reward",
    "rewards": "reward",
    "terminated": "done",
    "truncated": "done",
}
"""What other projects call these keys."""
RETURNS = 'return a text for the policy to read, None when it is over, or {"observation": ..., "reward": ...}'


@dataclass(frozen=True)
class Step:
    """The environment of a run, loaded."""

    spec: str
    """As it was written."""
    function: Callable[..., Any]
    """The step itself, or the class."""
    accepts: frozenset[str] | None
    """Names of the arguments of a step; None: any."""
    is_async: bool
    is_class: bool
    accepts_at_start: frozenset[str] | None = frozenset()
    """Names of the arguments of the class; None: any."""

    def arguments(self, values: Mapping[str, Any], *, at_start: bool = False) -> dict[str, Any]:
        """Return those of `values` that the step accepts, or the class if `at_start`."""
        accepts = self.accepts_at_start if at_start else self.accepts
        return {name: value for name, value in values.items() if accepts is None or name in accepts}


@dataclass(frozen=True)
class Reply:
    """What an environment answers to a turn."""

    observation: str | list[Message] | None = None
    """What the policy reads before its next turn; None: the episode is over."""
    reward: float | None = None
    """Of this turn; None: it has none, which counts as 0."""


def load_environment(spec: str, *, columns: Collection[str]) -> Step:
    """Load an environment and check that it can be called.

    Args:
        spec: ``file.py:name``, ``package.module:name`` or ``package.module.name``.
        columns: names that the data has for it.

    Raises:
        ConfigError: it cannot be found, loaded, or called with what there is.
    """
    if not split_spec(spec)[0]:
        raise ConfigError(f"task.environment={spec} names no file; write task.environment=my_environment.py:{spec}")
    loaded = load_function(spec, KIND)
    if not inspect.isclass(loaded):
        accepts = _accepted(loaded, spec, [*OF_TURN, *columns])
        return Step(spec, loaded, accepts, is_async(loaded), is_class=False)
    step = getattr(loaded, "step", None)
    if not inspect.isfunction(step) or isinstance(inspect.getattr_static(loaded, "step"), staticmethod):
        raise ConfigError(f"task.environment={spec}: the class has no method step; {KIND.how}")
    accepts = _accepted(step, spec, [*OF_TURN, *columns], is_method=True)
    at_start, takes_any = _named(loaded, spec) if loaded.__init__ is not object.__init__ else ({}, False)
    _check_available(at_start, spec, ["prompt", *columns], "its class")
    return Step(spec, loaded, accepts, is_async(step), True, None if takes_any else frozenset(at_start))


def _named(function: Callable[..., Any], spec: str) -> tuple[dict[str, inspect.Parameter], bool]:
    return named_parameters(function, spec, KIND)


def _accepted(
    step: Callable[..., Any], spec: str, available: Sequence[str], *, is_method: bool = False
) -> frozenset[str] | None:
    """Return the names that a step accepts, None for any, once it can be called with those that are available."""
    named, takes_any = _named(step, spec)
    if is_method:
        named.pop(next(iter(named), ""), None)
    if {"prompts", "completions"} & set(named):
        raise ConfigError(
            f"task.environment={spec} takes 'completions'; an environment gets one 'completion' at a time: async steps "
            "wait together"
        )
    if "completion" not in named and not takes_any:
        raise ConfigError(
            f"task.environment={spec} does not take the completion: its parameters are "
            f"{listed(named or ['none'], 'and')}; {KIND.how}"
        )
    if yields(step):
        raise ConfigError(f"task.environment={spec} yields; {RETURNS}")
    if never_returns(step):
        raise ConfigError(f"task.environment={spec} has no return, so every episode would have one turn; {RETURNS}")
    _check_available(named, spec, available, "it")
    return None if takes_any else frozenset(named)


def _check_available(named: Mapping[str, inspect.Parameter], spec: str, available: Sequence[str], subject: str) -> None:
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in available]
    if missing:
        raise ConfigError(
            f"task.environment={spec}: {subject} needs {missing[0]!r}, which is not a column"
            f"{did_you_mean(missing[0], available)}; there are {listed(available, 'and')}"
        )


def checked_reply(result: Any) -> Reply | Failure:
    """Return what an environment answered, or what is wrong with it."""
    if result is None:
        return Reply()
    if isinstance(result, (str, list)):
        observation = _observation(result)
        return observation if isinstance(observation, Failure) else Reply(observation)
    if not isinstance(result, Mapping):
        return Failure(f"it returned {a_type(result)}; {RETURNS}")
    unknown = next((key for key in result if key not in PARTS), None)
    if unknown is not None:
        meant = OTHER_NAMES.get(str(unknown))
        hint = f" (did you mean {meant!r}?)" if meant else did_you_mean(str(unknown), PARTS)
        return Failure(f"it returned a dict with {unknown!r}{hint}; its keys are {listed(PARTS, 'and')}")
    reward = None if result.get("reward") is None else checked_number(result["reward"])
    if isinstance(reward, str):
        return Failure(f"its reward {reward.replace('returned', 'is', 1).replace('a dict of numbers, ', '')}")
    value, done = result.get("observation"), result.get("done")
    if not isinstance(done, (bool, type(None))):
        return Failure(f"its done is {a_type(done)}; write True or False")
    if done or value is None:
        return Failure("it is not done and has no observation") if done is False else Reply(None, reward)
    observation = _observation(value)
    return observation if isinstance(observation, Failure) else Reply(observation, reward)


def _observation(value: Any) -> str | list[Message] | Failure:
    if isinstance(value, str):
        return value or Failure("its observation is empty; return None when the episode is over")
    if not isinstance(value, list):
        return Failure(f"its observation is {a_type(value)}; it is a text or a list of chat messages")
    wrong = wrong_with_messages(value)
    if wrong is None and any(message["role"] == "assistant" for message in value):
        wrong = "a message has the role 'assistant', which is the policy's"
    return Failure(f"its observation: {wrong}") if wrong else value
