"""Config of the rollouts; no torch here."""

from __future__ import annotations

from pydantic import PositiveFloat, PositiveInt

from toolkit.schema import Config


class RolloutConfig(Config):
    """How completions are sampled."""

    prompts_per_step: PositiveInt = 128
    """Prompts in one rollout, over all processes."""
    group_size: PositiveInt = 8
    """Completions of each prompt: the group that most advantages are relative to; these need 2 or more."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss scores tokens at the same one."""
    max_new_tokens: PositiveInt | None = None
    """Longest completion; None: as long as the task's longest answer."""
    skip_uniform_groups: bool = True
    """Skip groups whose advantages are all 0, as those of equal rewards are in GRPO (DAPO's dynamic sampling)."""
