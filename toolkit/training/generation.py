"""Completions of prompts by the policy that is trained, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolkit.rollout.config import RolloutConfig
from toolkit.rollout.sampler import Completions, complete, row_uniforms
from toolkit.tasks.base import Example
from toolkit.training.draws import Draws
from toolkit.training.sharding import is_sharded, unwrapped


class Generator:
    """Completes prompts; all processes call it together."""

    def __init__(self, config: RolloutConfig, policy: Any, tokenizer: Any, draws: Draws, max_new_tokens: int) -> None:
        """Take a policy from `prepare_policy`."""
        self.config, self.policy, self.tokenizer, self.draws = config, policy, tokenizer, draws
        self.max_new_tokens = max_new_tokens
        """Tokens of the longest completion, the end of the text included."""

    def greedy(self, prompts: Sequence[Example]) -> Completions:
        """Return the most probable completion of each prompt, token by token."""
        return self._complete([example.prompt for example in prompts])

    def sample(
        self,
        prompts: Sequence[Example],
        indices: range,
        step: int,
        *,
        group_size: int,
        purpose: str = "main",
        temperature: float | None = None,
    ) -> Completions:
        """Return samples of each prompt, each token drawn from (seed, purpose, step, prompt, sample, position).

        Args:
            prompts: of this process; all must sample, so a process without prompts gives any one of them.
            indices: number of each prompt in the step, over all processes; empty for a process without prompts.
            step: of the main phase.
            group_size: samples of each prompt.
            purpose: what the samples are for; those for one purpose do not depend on those for another.
            temperature: None: that of the rollouts.
        """
        samples = [(prompt, sample) for prompt in indices for sample in range(group_size)]
        seeds = [self.draws.key(purpose, step, "sample", *sample) for sample in samples]
        completions = self._complete(
            [example.prompt for example in prompts],
            group_size=group_size,
            temperature=self.config.temperature if temperature is None else temperature,
            uniforms=row_uniforms(seeds or [""] * group_size, self.max_new_tokens),
        )
        return completions.first(len(samples))

    def _complete(self, prompts: list[str], **options: Any) -> Completions:
        options |= {"max_new_tokens": self.max_new_tokens, "synced_gpus": is_sharded(self.policy)}
        return unwrapped(self.policy).inside(complete, self.tokenizer, prompts, **options)
