"""The base config of a task: its rewards, and the environment of its episodes; no torch here."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, FiniteFloat, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from toolkit.errors import ConfigError
from toolkit.schema import Config

if TYPE_CHECKING:
    from toolkit.tasks.base import Task
    from toolkit.tasks.episodes import Environment
    from toolkit.tasks.scoring import RewardSet

USUAL_TURNS = 8
"""Turns of an episode, if ``task.max_turns`` does not say."""
Share = Annotated[float, Field(ge=0, le=1)]


class TaskConfig(Config):
    """Base config of a task."""

    columns: ClassVar[tuple[str, ...]] = ("answer",)
    """What the task has for rewards besides prompt and completion."""
    has_verifier: ClassVar[bool] = True
    """Whether `Task.score` gives a reward."""
    demonstrates: ClassVar[bool] = True
    """Whether the task makes demonstrations for the warm-up by itself."""

    reward: str | tuple[str, ...] | None = "verifier"
    """verifier: 1 for a right and finished answer, else 0. coin_flip: a control that must not learn. A built-in reward
    (exact_match, numeric, regex, format, length, math_verify), a function file.py:name or package.module:name, or a
    list of them."""
    reward_weights: tuple[FiniteFloat, ...] | None = None
    """Weight of each reward in their sum; None: 1."""
    reward_timeout_s: PositiveFloat = 30.0
    """Seconds for a call of a reward or of the environment; then the completion's reward is 0, and a metric counts
    it."""
    reward_workers: NonNegativeInt = 0
    """Processes that call each reward, and the environment, for every training process; 0: called in the training
    process."""
    max_reward_failures: Share = 0.5
    """Share of a step's completions whose reward or environment may raise, run out of time or return something wrong;
    more ends the run."""
    environment: str | None = None
    """A function file.py:name or package.module:name that answers each turn with what the policy reads next, or a class
    with such a method step; None: a completion is one turn."""
    max_turns: PositiveInt | None = None
    """Turns of an episode, each of at most rollout.max_new_tokens; None: 8. Needs `environment`."""
    pattern: str | None = None
    """Regular expression of the rewards regex (somewhere in the completion) and format (all of it)."""
    target_length: PositiveInt | None = None
    """Tokens up to which the reward length is 1; at twice as many it is 0."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """The rewards as a tuple."""
        if self.reward is None:
            return ()
        return (self.reward,) if isinstance(self.reward, str) else self.reward

    @property
    def reward_settings(self) -> dict[str, Any]:
        """Arguments of built-in rewards that are set."""
        settings = {"pattern": self.pattern, "target_length": self.target_length}
        return {name: value for name, value in settings.items() if value is not None}

    @field_validator("pattern")
    @classmethod
    def _pattern_compiles(cls, pattern: str | None) -> str | None:
        if pattern == "":
            raise ValueError("it is empty, so it matches anything")
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"it is not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _rewards_fit(self) -> TaskConfig:
        from toolkit.tasks.rewards import check_name

        for spec in self.rewards:
            check_name(spec)
            if spec == "verifier" and not self.has_verifier:
                raise ConfigError(
                    "task.reward=verifier: data has no verifier; name a built-in reward, such as exact_match, or your "
                    "function: task.reward=my_reward.py:score"
                )
        weights = self.reward_weights
        if weights is not None and len(weights) != len(self.rewards):
            raise ConfigError(
                f"task.reward_weights={list(weights)} beside {len(self.rewards)} of task.reward; give one for each"
            )
        if weights and not any(weights):
            raise ConfigError(f"task.reward_weights={list(weights)}: no reward counts; give one another weight than 0")
        return self

    @model_validator(mode="after")
    def _turns_need_an_environment(self) -> TaskConfig:
        if self.max_turns is not None and self.environment is None:
            raise ConfigError(
                f"task.max_turns={self.max_turns} has no effect without an environment; set "
                "task.environment=my_environment.py:step, or remove it"
            )
        return self

    @abstractmethod
    def build(self, seed: int) -> Task:
        """Return the task; the same seed gives the same prompts."""

    def check_data(self, seed: int, *, with_completions: bool) -> None:
        """Read and check what needs no model, and load the functions; `with_completions` if a run imitates answers.

        Raises:
            ConfigError: the data, a reward or the environment is wrong.
        """
        self.build_rewards(seed)
        self.build_environment(seed)

    def data_digest(self, seed: int) -> str | None:
        """Return a digest of rows that may change between a run and its continuation; None: there are none."""
        return None

    def reward_digests(self) -> dict[str, str]:
        """Return the files of rewards and environment, as they are written, with a digest of what was loaded."""
        from toolkit.tasks.functions import file_digests

        return file_digests([*self.rewards, *filter(None, [self.environment])])

    def build_rewards(self, seed: int) -> RewardSet:
        """Return the rewards, loaded; the seed is that of `build`."""
        return self._load_rewards(self.columns)

    def build_environment(self, seed: int) -> Environment | None:
        """Return the environment, loaded, if there is one; the seed is that of `build`."""
        return self._load_environment(self.columns)

    def _load_environment(self, columns: tuple[str, ...]) -> Environment | None:
        if self.environment is None:
            return None
        from toolkit.tasks.environment import load_environment
        from toolkit.tasks.episodes import Environment

        return Environment(
            load_environment(self.environment, columns=columns),
            max_turns=self.max_turns or USUAL_TURNS,
            timeout_s=self.reward_timeout_s,
            num_workers=self.reward_workers,
            columns=columns,
        )

    def _load_rewards(self, columns: tuple[str, ...]) -> RewardSet:
        from toolkit.tasks.environment import OF_EPISODE
        from toolkit.tasks.rewards import load_rewards
        from toolkit.tasks.scoring import ENVIRONMENT, RewardSet

        if self.environment is not None:
            columns = (*columns, *OF_EPISODE)
        settings = self.reward_settings
        rewards = load_rewards(self.rewards, columns=columns, settings=settings) if self.rewards else []
        if self.environment is not None and any(reward.name == ENVIRONMENT for reward in rewards):
            raise ConfigError(
                f"task.reward has a function named {ENVIRONMENT!r}, as the reward of the turns is named; rename it"
            )
        return RewardSet(
            rewards,
            self.reward_weights,
            timeout_s=self.reward_timeout_s,
            num_workers=self.reward_workers,
            columns=columns,
            settings=settings,
        )
