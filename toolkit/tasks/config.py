"""Configs of the tasks; no torch here."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from toolkit.schema import Config

if TYPE_CHECKING:
    from toolkit.tasks.base import Task


class TaskConfig(Config):
    """Base config of a task."""

    reward: Literal["verifier", "coin_flip"] = "verifier"
    """verifier: 1 for a right and finished answer, else 0. coin_flip: a control that must not learn."""

    @abstractmethod
    def build(self, seed: int) -> Task:
        """Return the task; the same seed gives the same prompts."""


class SpellBackwardConfig(TaskConfig):
    """reasoning-gym's spell_backward on words of one length: ``word=`` is to be continued with ``drow``."""

    word_length: Annotated[int, Field(ge=3, le=10)] = 4
    """Letters in a word; reasoning-gym has words of 3 to 10."""
    num_heldout: PositiveInt = 512
    """Words that are only ever used to measure accuracy; RL uses the others."""

    def build(self, seed: int) -> Task:
        """Return the task; needs the extra [train]."""
        from toolkit.tasks.spell_backward import SpellBackward

        return SpellBackward(seed, word_length=self.word_length, num_heldout=self.num_heldout)
