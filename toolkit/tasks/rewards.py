"""Reward functions by name, file or dotted path, checked before any work; no torch here.

A reward is ``score(prompt, completion, **columns) -> float | dict[str, float] | None``, or batched with the parameters
``prompts`` and ``completions`` (lists) and a list as its result; either may be async. It gets only the keyword
arguments that its signature accepts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.tasks import builtin_rewards
from toolkit.tasks.functions import Kind, is_async, load_function, named_parameters, never_returns, split_spec, yields

BUILT_IN: dict[str, Callable[..., Any]] = {
    "exact_match": builtin_rewards.exact_match,
    "numeric": builtin_rewards.numeric,
    "regex": builtin_rewards.regex,
    "format": builtin_rewards.format,
    "length": builtin_rewards.length,
    "math_verify": builtin_rewards.math_verify,
}
"""Rewards that ``task.reward`` takes by name."""
OF_TASK = ("verifier", "coin_flip")
"""Rewards without a function: the verifier of the task, and a control that must not learn."""
OF_COMPLETION = ("num_tokens", "finished")
"""Arguments that say more of a completion: its tokens, and whether it ended by itself."""
COMPLETIONS = (
    "response",
    "solution_str",
    "output",
    "generation",
    "generated",
    "text",
    "pred",
    "prediction",
    "solution",
)
"""What rewards of other projects call the completion."""
HOW = "a reward is def score(prompt, completion, **columns), with arguments handed over by name"
REWARD = Kind("task.reward", "score", HOW)
"""What `toolkit.tasks.functions` says of a reward."""


@dataclass(frozen=True)
class Reward:
    """One reward of a run."""

    spec: str
    """As it was written."""
    name: str
    """In metrics."""
    function: Callable[..., Any] | None = None
    """None: one of `OF_TASK`."""
    is_batched: bool = False
    is_async: bool = False
    accepts: frozenset[str] | None = None
    """Names of its arguments; None: any."""
    required: tuple[str, ...] = ()
    """Those without a default."""

    def arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of `values` that the function accepts."""
        return {name: value for name, value in values.items() if self.accepts is None or name in self.accepts}


def load_rewards(specs: Sequence[str], *, columns: Collection[str], settings: Collection[str] = ()) -> list[Reward]:
    """Load rewards and check that they can be called.

    Args:
        specs: names of built-in rewards, ``file.py:name``, ``package.module:name`` or ``package.module.name``.
        columns: names that the data has for them.
        settings: names that the task's settings add for built-in rewards.

    Raises:
        ConfigError: a reward cannot be found, loaded, or called with what there is.
    """
    if not specs:
        raise ConfigError(f"task.reward is empty; name one: {listed(BUILT_IN)}, or file.py:name")
    repeated = [spec for spec in specs if list(specs).count(spec) > 1]
    if repeated:
        raise ConfigError(f"task.reward names {repeated[0]!r} twice; give it a larger weight instead")
    functions = {spec: None if spec in OF_TASK else _function_of(spec) for spec in specs}
    names = _distinct_names(specs)
    return [_checked(spec, names[spec], functions[spec], columns, settings) for spec in specs]


def _distinct_names(specs: Sequence[str]) -> dict[str, str]:
    """Return a name of each reward for metrics: that of the function, with its file or module where two agree."""
    short = {spec: split_spec(spec)[1] or spec for spec in specs}
    by_module = {spec: f"{Path(split_spec(spec)[0]).stem.rpartition('.')[2]}.{short[spec]}" for spec in specs}
    chosen: dict[str, str] = {}
    for spec in specs:
        is_shared = list(short.values()).count(short[spec]) > 1
        still_shared = list(by_module.values()).count(by_module[spec]) > 1
        full = spec.replace("/", ".")
        chosen[spec] = short[spec] if not is_shared else full if still_shared else by_module[spec]
    return chosen


def check_name(spec: str) -> None:
    """Raise if a reward has neither the name of a built-in one nor the form of a function.

    Raises:
        ConfigError: it has not.
    """
    names = [*BUILT_IN, *OF_TASK]
    if spec not in names and not split_spec(spec)[0]:
        raise ConfigError(
            f"task.reward={spec} is not a built-in reward{did_you_mean(spec, names)}; choose {listed(names)}, or name "
            "your function: task.reward=my_reward.py:score"
        )


def _function_of(spec: str) -> Callable[..., Any]:
    if spec == "math_verify" and importlib.util.find_spec("math_verify") is None:
        raise ConfigError('task.reward=math_verify needs the package math-verify: pip install "rl-loss-toolkit[math]"')
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    check_name(spec)
    return load_function(spec, REWARD)


def _checked(
    spec: str,
    name: str,
    function: Callable[..., Any] | None,
    columns: Collection[str],
    settings: Collection[str],
) -> Reward:
    if function is None:
        return Reward(spec, name)
    named, takes_any = named_parameters(function, spec, REWARD)
    is_batched = bool({"prompts", "completions"} & set(named))
    text = ("prompts", "completions") if is_batched else ("prompt", "completion")
    if text[1] not in named and not takes_any and spec not in BUILT_IN:
        likely = next((other for other in COMPLETIONS if other in named), None)
        remedy = f"; call {likely!r} {text[1]!r}, or wrap it" if likely else ""
        raise ConfigError(
            f"task.reward={spec} does not take the completion: its parameters are {listed(named or ['none'], 'and')}"
            f"{remedy}; {HOW}"
        )
    if yields(function):
        raise ConfigError(f"task.reward={spec} yields; a reward returns a number, so write return")
    if never_returns(function):
        raise ConfigError(f"task.reward={spec} has no return, so every reward would be None; write return")
    available = [*text, *OF_COMPLETION, *columns, *settings]
    missing = [p.name for p in named.values() if p.default is p.empty and p.name not in available]
    if missing and is_batched and f"{missing[0]}s" in text:
        raise ConfigError(
            f"task.reward={spec} takes {listed([text[1], missing[0]], 'and')}; a reward takes 'prompt' and "
            "'completion', or for all completions at once 'prompts' and 'completions'"
        )
    if missing:
        shown = [column for column in columns if column not in text]
        data = f"the data has {listed(shown, 'and')}" if shown else "the data has no other column"
        how = builtin_rewards.NEEDS.get(missing[0], "") if spec in BUILT_IN else ""
        raise ConfigError(
            f"task.reward={spec} needs {missing[0]!r}, which is not a column{did_you_mean(missing[0], shown)}; {data}, "
            f"and every reward can take {listed([*text, *OF_COMPLETION], 'and')}{how}"
        )
    accepts = None if takes_any else frozenset(named)
    required = tuple(p.name for p in named.values() if p.default is p.empty)
    return Reward(spec, name, function, is_batched, is_async(function), accepts, required)
