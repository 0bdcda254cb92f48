"""Configs of the tasks; no torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from toolkit.errors import ConfigError, listed
from toolkit.schema import FrozenDict
from toolkit.tasks.task_config import TaskConfig as TaskConfig

if TYPE_CHECKING:
    from toolkit.tasks.base import Task
    from toolkit.tasks.episodes import Environment
    from toolkit.tasks.rows import Loaded, Source
    from toolkit.tasks.scoring import RewardSet


class SpellBackwardConfig(TaskConfig):
    """reasoning-gym's spell_backward on words of one length: ``word=`` is to be continued with ``drow``."""

    word_length: Annotated[int, Field(ge=3, le=10)] = 4
    """Letters in a word; reasoning-gym has words of 3 to 10."""
    demonstrated_length: Annotated[int, Field(ge=3, le=10)] | None = None
    """Letters in a word of the warm-up and of loss=ce; None: as in `word_length`."""
    partial_credit: bool = False
    """Reward the share of letters that are in their place, over the longer of answer and completion; the right word is
    1. False: 1 or 0."""
    num_heldout: PositiveInt = 512
    """Words that are only ever used to measure accuracy; RL uses the others."""

    def build(self, seed: int) -> Task:
        """Return the task; needs the extra [train]."""
        from toolkit.tasks.spell_backward import SpellBackward

        return SpellBackward(
            seed,
            word_length=self.word_length,
            num_heldout=self.num_heldout,
            demonstrated_length=self.demonstrated_length,
            partial_credit=self.partial_credit,
        )


class ReasoningGymConfig(TaskConfig):
    """Any task of reasoning-gym with its verifier, or several mixed in equal parts."""

    columns: ClassVar[tuple[str, ...]] = ("answer", "task")
    demonstrates: ClassVar[bool] = False

    name: str | None = None
    """Name of a task of reasoning-gym, such as chain_sum; or give `names`."""
    names: tuple[str, ...] = ()
    """Names of several tasks, mixed in equal parts."""
    size: PositiveInt = 2000
    """Prompts drawn of each task; equal ones count once."""
    num_heldout: PositiveInt = 200
    """Prompts that only measure."""
    options: Mapping[str, Any] | None = None
    """Settings of reasoning-gym's tasks, such as {max_terms: 2}; None: their defaults."""
    as_chat: bool = False
    """Make a question the user's message of the tokenizer's chat template."""
    system_prompt: str | None = None
    """A message before it; needs `as_chat`."""
    num_shots: NonNegativeInt = 0
    """Solved examples of the same task before each question (few-shot): turns of the chat with `as_chat`, text else."""

    @field_validator("options", mode="after")
    @classmethod
    def _freeze_options(cls, options: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        return None if options is None else FrozenDict(options)

    @model_validator(mode="after")
    def _is_named(self) -> ReasoningGymConfig:
        if (self.name is None) == (not self.names):
            raise ConfigError("task=reasoning_gym needs task.name=chain_sum, or task.names=[chain_sum,gcd] for several")
        if self.system_prompt is not None and not self.as_chat:
            raise ConfigError("task.system_prompt has no effect on prompts that are text; set task.as_chat=true, too")
        return self

    @property
    def _names(self) -> tuple[str, ...]:
        return self.names if self.name is None else (self.name,)

    def check_data(self, seed: int, *, with_completions: bool) -> None:
        """Check the names, and load rewards and environment."""
        from toolkit.tasks.gym import check_names

        check_names(self._names)
        super().check_data(seed, with_completions=with_completions)

    def build(self, seed: int) -> Task:
        """Return the task; needs the extra [train]."""
        from toolkit.tasks.gym import ReasoningGym

        return ReasoningGym(
            seed,
            names=self._names,
            size=self.size,
            num_heldout=self.num_heldout,
            options=self.options or {},
            as_chat=self.as_chat,
            system_prompt=self.system_prompt,
            num_shots=self.num_shots,
        )


class DatasetConfig(TaskConfig):
    """Your prompts: a file, a folder of files, or a repository of `datasets`."""

    has_verifier: ClassVar[bool] = False
    demonstrates: ClassVar[bool] = False
    needs_completions: ClassVar[bool] = False
    """Whether every row needs something to imitate, whatever the loss."""

    reward: str | tuple[str, ...] | None = None
    """A built-in reward (exact_match, numeric, regex, format, length, math_verify), your function file.py:name or
    package.module:name, or a list of them; RL needs one."""
    path: str
    """A .jsonl, .json, .csv or .parquet file, a folder of them, or a repository of `datasets`: owner/name[:split]."""
    prompt_column: str = "prompt"
    """Column of the prompt: a text, or a list of chat messages."""
    prompt_template: str | None = None
    """A prompt made of columns, such as '{question} Answer:'; None: the prompt column."""
    completion_column: str = "completion"
    """Column of the text (or messages) that supervised learning imitates."""
    messages_column: str = "messages"
    """Column of whole conversations, read where a row has no prompt; what the assistant writes is imitated."""
    answer_column: str = "answer"
    """Column that rewards get as `answer`; if a row lacks it, its completion."""
    tools_column: str = "tools"
    """Column of tools for the chat template: a list of JSON schemas."""
    as_chat: bool = False
    """Make a prompt that is text the user's message of the tokenizer's chat template; messages always go through it."""
    system_prompt: str | None = None
    """A message before those of a prompt that has no system message."""
    heldout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the different prompts that only measure; not read if `heldout_path` or `heldout_column` is set."""
    heldout_path: str | None = None
    """File, folder or repository (owner/name:test) of the prompts that only measure."""
    heldout_column: str | None = None
    """Column that says which rows only measure: true or false, or test or train."""
    num_heldout: PositiveInt = 512
    """Most held-out rows that are measured."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """stop: a row that cannot be used ends the run before any work. skip: it is left out, and a note counts them."""
    split: str = "train"
    """Split of a repository whose name does not say it."""
    subset: str | None = None
    """Configuration of a repository."""

    @field_validator("path", "heldout_path", mode="before")
    @classmethod
    def _is_one_path(cls, path: Any) -> Any:
        if isinstance(path, (list, tuple)):
            raise ConfigError("task.path is one file or folder; put several files into a folder and name it")
        return path

    @field_validator("heldout", mode="before")
    @classmethod
    def _is_a_share(cls, share: Any) -> Any:
        if isinstance(share, (int, float)) and share > 1 and share == int(share):
            raise ConfigError(
                f"task.heldout={int(share)} is a share of the prompts, below 1; "
                f"task.num_heldout={int(share)} measures at most as many of them"
            )
        return share

    @model_validator(mode="after")
    def _one_split(self) -> DatasetConfig:
        if self.heldout_path is not None and self.heldout_column is not None:
            raise ConfigError("set one of task.heldout_path and task.heldout_column")
        return self

    @property
    def _source(self) -> Source:
        from toolkit.tasks.rows import Source

        fields = {name: getattr(self, name) for name in DatasetConfig.model_fields if name not in _OF_REWARDS}
        return Source(**fields, with_completions=self.needs_completions)

    def check_data(self, seed: int, *, with_completions: bool) -> None:
        """Read the data, and load rewards and environment."""
        from toolkit.tasks.rows import completion_remedy, load

        loaded = load(self._source, seed)
        if with_completions and not any(row.completion for row in loaded.train):
            raise ConfigError(
                f"task.path={self.path}: supervised learning needs rows with a column {self.completion_column!r} "
                f"(another name: task.completion_column=...) or {self.messages_column!r}"
                f"{completion_remedy(loaded.columns)}; the columns are "
                f"{listed(loaded.all_columns, 'and')} (warmup.steps=0 skips a warm-up, which needs them, too)"
            )
        self._say_what_is_missing(self.build_rewards(seed), loaded)
        self.build_environment(seed)

    @staticmethod
    def _say_what_is_missing(rewards: RewardSet, loaded: Loaded) -> None:
        """Note rows without a column that a reward takes, and columns that rewards cannot get."""
        from toolkit.tasks.rewards import BUILT_IN, OF_COMPLETION
        from toolkit.tasks.rows import note

        rows = [*loaded.train, *loaded.heldout]
        for reward in rewards.rewards:
            for name in reward.required:
                lacking = [row.where for row in rows if name in loaded.columns and row.columns.get(name) is None]
                if lacking:
                    what = "it does not apply to them" if reward.spec in BUILT_IN else "it gets None"
                    note(
                        f"{len(lacking)} of {len(rows)} rows have no {name!r}, which task.reward={reward.spec} takes: "
                        f"{what}; the first is {lacking[0]}"
                    )
            for name in (reward.accepts or frozenset()) & {*loaded.columns} & {*OF_COMPLETION}:
                note(f"task.reward={reward.spec} gets the completion's {name!r}, not the column; rename the column")

    def data_digest(self, seed: int) -> str | None:
        """Return a digest of all rows, their order and which are held out."""
        from toolkit.tasks.rows import load

        loaded = load(self._source, seed)
        rows = [(row.prompt, row.completion, row.columns) for row in (*loaded.train, *loaded.heldout)]
        return hashlib.sha256(repr((len(loaded.train), rows)).encode()).hexdigest()[:16]

    def build_rewards(self, seed: int) -> RewardSet:
        """Return the rewards, loaded."""
        from toolkit.tasks.rows import load

        return self._load_rewards(load(self._source, seed).columns)

    def build_environment(self, seed: int) -> Environment | None:
        """Return the environment, loaded."""
        from toolkit.tasks.rows import load

        return None if self.environment is None else self._load_environment(load(self._source, seed).columns)

    def build(self, seed: int) -> Task:
        """Return the task."""
        from toolkit.tasks.dataset import DatasetTask

        return DatasetTask(self._source, seed)


_OF_REWARDS = frozenset(TaskConfig.model_fields)


class SFTConfig(DatasetConfig):
    """Your demonstrations: prompts with completions, or conversations."""

    needs_completions: ClassVar[bool] = True
