"""Config of the rollouts; no torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt, model_validator

from toolkit.errors import ConfigError
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
    max_sampling_rounds: PositiveInt = 1
    """Batches of prompts that a step may sample to replace groups that skip_uniform_groups skips, until it has
    prompts_per_step others; at the limit it goes on with those it has. 1: skipped groups are not replaced."""
    truncated: Literal["keep", "mask"] = "keep"
    """Completions cut at max_new_tokens: keep them, or mask them, which leaves them out of the loss (DAPO's overlong
    filtering); their rewards still count in the statistics of their group."""
    overlong_buffer: PositiveInt | None = None
    """Tokens before max_new_tokens over which a penalty of the reward grows from 0 to overlong_penalty (DAPO's soft
    overlong punishment); None: no penalty."""
    overlong_penalty: PositiveFloat = 1.0
    """What a completion of max_new_tokens loses by overlong_buffer."""
    old_logprobs: Literal["sampler", "recomputed"] = "sampler"
    """Log-probabilities of the policy that sampled: the sampler's own, compared once with those of a forward and
    replaced by them if they are further apart than rounding; or from a forward in each step. With a correction, or a
    loss that reads the sampler's too, always the forward's."""

    @model_validator(mode="after")
    def _penalty_has_an_effect(self) -> RolloutConfig:
        if self.overlong_penalty != 1 and self.overlong_buffer is None:
            raise ConfigError(
                f"rollout.overlong_penalty={self.overlong_penalty} has no effect without rollout.overlong_buffer; "
                "set both, or remove it"
            )
        if self.overlong_buffer is None:
            return self
        if self.max_new_tokens is None:
            raise ConfigError(
                f"rollout.overlong_buffer={self.overlong_buffer} needs rollout.max_new_tokens: by default completions "
                "are cut where the longest answer ends, which would be penalised; set it to the longest answer plus "
                "the buffer, or more"
            )
        if self.overlong_buffer > self.max_new_tokens:
            raise ConfigError(
                f"rollout.overlong_buffer={self.overlong_buffer} is longer than a completion, which has at most "
                f"rollout.max_new_tokens={self.max_new_tokens} tokens; give fewer tokens"
            )
        return self
