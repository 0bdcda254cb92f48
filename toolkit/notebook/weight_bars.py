"""What an aggregation makes of completions of several lengths: the weight of a token, the share of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from toolkit.errors import ConfigError
from toolkit.functional.aggregation import share
from toolkit.losses.config.aggregation import PER_COMPONENT, AggregationConfig


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One completion of a step."""

    length: int
    """Scored tokens."""
    prompt: int
    """Which prompt it answers."""
    is_good: bool
    """Whether its advantage is above 0."""

    @property
    def label(self) -> str:
        """In words."""
        return f"{self.length} tokens, prompt {self.prompt + 1}, A {'> 0' if self.is_good else '< 0'}"


def completions_of(lengths: Sequence[int]) -> list[Completion]:
    """Return completions of two prompts, in turn good and bad.

    Raises:
        ConfigError: there are none, or one has no token.
    """
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"lengths={list(lengths)} must be at least one number of tokens, each 1 or more")
    half = (len(lengths) + 1) // 2
    return [
        Completion(length=length, prompt=int(index >= half), is_good=index % 2 == 0)
        for index, length in enumerate(lengths)
    ]


def token_weights(completions: Sequence[Completion], aggregation: AggregationConfig) -> list[float]:
    """Return the weight that one token of each completion has in the loss."""
    if aggregation.name == PER_COMPONENT:
        counts = {is_good: sum(c.length for c in completions if c.is_good == is_good) for is_good in (True, False)}
        factors = {True: aggregation.positive_weight, False: aggregation.negative_weight}
        return [factors[c.is_good] / counts[c.is_good] for c in completions]
    lengths = torch.tensor([c.length for c in completions])
    ids = torch.arange(len(completions)).repeat_interleave(lengths)[None]
    prompts = torch.tensor([c.prompt for c in completions])
    of_prompt = torch.zeros(int(prompts.max()) + 1, dtype=torch.long).index_add(0, prompts, lengths)
    part = share(
        torch.ones_like(ids, dtype=torch.bool),
        ids,
        aggregation.name,
        length=aggregation.length,
        count_empty=aggregation.count_empty,
        prompt_tokens=of_prompt[prompts[ids]],
        num_prompts=len(set(prompts.tolist())),
    )
    weights = part.weights if part.is_sum else part.divided(part.count)
    starts = lengths.cumsum(0) - lengths
    return weights[0, starts].tolist()
