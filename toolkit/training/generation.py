"""Completions of prompts by the policy that is trained, the same on any number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from toolkit.rollout.config import RolloutConfig
from toolkit.rollout.sampler import Completions, complete, continued, row_uniforms
from toolkit.rollout.turns import play
from toolkit.tasks.base import Example
from toolkit.tasks.episodes import Environment
from toolkit.training.draws import Draws
from toolkit.training.sharding import is_sharded, unwrapped


class Generator:
    """Completes prompts, turn by turn if there is an environment; all processes call it together."""

    def __init__(
        self,
        config: RolloutConfig,
        policy: Any,
        tokenizer: Any,
        draws: Draws,
        max_new_tokens: int,
        *,
        environment: Environment | None = None,
        context: int | None = None,
    ) -> None:
        """Take a policy from `prepare_policy`, and how many tokens it reads at most, if that is known."""
        self.config, self.policy, self.tokenizer, self.draws = config, policy, tokenizer, draws
        self.max_new_tokens = max_new_tokens
        """Tokens of the longest completion (the longest turn with an environment), the end of the text included."""
        self.environment, self.context = environment, context

    def greedy(self, prompts: Sequence[Example]) -> Completions:
        """Return the most probable completion of each prompt, token by token."""
        return self._complete(prompts, None)

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

        The tokens of a turn after the first are drawn from its number, too.

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
        return self._complete(prompts, seeds, group_size=group_size, temperature=temperature)

    def _complete(
        self,
        prompts: Sequence[Example],
        seeds: Sequence[str] | None,
        group_size: int = 1,
        temperature: float | None = None,
    ) -> Completions:
        """Return the first rows: one for each of `seeds`, or all of them, greedily, without."""
        texts = [example.prompt for example in prompts]
        number = len(texts) if seeds is None else len(seeds)
        draws = self._drawn(seeds or [""] * group_size, temperature) if seeds is not None else {}
        first = self._generate(complete, texts, group_size=group_size, **draws)
        if self.environment is None:
            return first.first(number)
        examples = [example for example in prompts for _ in range(group_size)][:number]

        def continue_rows(ids: Tensor, mask: Tensor, rows: list[int], turn: int) -> Completions:
            keys = [] if seeds is None else [f"{seeds[row]}/turn/{turn}" for row in rows]
            draws = self._drawn(keys or [""], temperature) if seeds is not None else {}
            return self._generate(continued, ids, mask, **draws)

        longest = None if self.context is None else self.context - self.max_new_tokens
        return play(first, examples, self.environment, continue_rows, self.tokenizer, longest=longest)

    def _drawn(self, keys: Sequence[str], temperature: float | None) -> dict[str, Any]:
        """Return the options that sample each row by its key."""
        chosen = self.config.temperature if temperature is None else temperature
        return {"temperature": chosen, "uniforms": row_uniforms(keys, self.max_new_tokens)}

    def _generate(self, function: Callable[..., Completions], *inputs: Any, **options: Any) -> Completions:
        options |= {"max_new_tokens": self.max_new_tokens, "synced_gpus": is_sharded(self.policy)}
        return unwrapped(self.policy).inside(function, self.tokenizer, *inputs, **options)
