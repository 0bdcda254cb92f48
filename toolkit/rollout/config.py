"""Config of the rollouts; no torch here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from toolkit.schema import Config

Positive = Annotated[int, Field(gt=0)]


class RolloutConfig(Config):
    """How completions are sampled."""

    prompts_per_step: Positive = 128
    """Prompts in one rollout, over all processes."""
    group_size: Positive = 8
    """Completions of each prompt: the group that most advantages are relative to; these need 2 or more."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the loss scores tokens at the same one."""
    max_new_tokens: Positive | None = None
    """Longest completion; None: as long as the task's longest answer."""
    skip_uniform_groups: bool = True
    """Skip groups whose advantages are all 0, as those of equal rewards are in GRPO (DAPO's dynamic sampling)."""
