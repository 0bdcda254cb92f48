"""Completions that are too long: a reward that falls before the limit, and those that were cut.

Source: DAPO (Yu et al. 2025), arXiv 2503.14476, section 3.4. Legend: R completions, K rewards of each.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from toolkit.metrics import Mean
from toolkit.rollout.config import RolloutConfig
from toolkit.rollout.sampler import Completions
from toolkit.training.rewarding import Rewarded

PENALTY = "overlong_penalty"
"""Metric: mean of what is added to rewards, 0 or less."""


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """Return DAPO's soft overlong punishment, [R] float32 in [-1, 0].

    0 up to ``max_length - buffer`` tokens, then ``(max_length - buffer - length) / buffer``, -1 from max_length on.

    Args:
        lengths: [R] tokens of each completion, the end of the text included.
        max_length: L_max, where completions are cut.
        buffer: L_cache, tokens over which the punishment grows.
    Source: arXiv 2503.14476, eq. 13.
    """
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


class Overlong:
    """What a run does about long completions."""

    def __init__(self, config: RolloutConfig) -> None:
        self.config = config

    def penalised(self, rewarded: Rewarded, completions: Completions) -> Rewarded:
        """Add the penalty of this process's completions to their rewards, as one more part of them."""
        buffer, coef, max_length = self.config.overlong_buffer, self.config.overlong_penalty, self.config.max_new_tokens
        if buffer is None:
            return rewarded
        assert max_length is not None  # RolloutConfig has made sure
        lengths = completions.is_new.sum(-1).cpu()
        penalty = overlong_penalty(lengths, max_length=max_length, buffer=buffer)
        totals = rewarded.totals
        parts = totals.unsqueeze(-1) if rewarded.parts is None else rewarded.parts
        weights = totals.new_ones(1) if rewarded.weights is None else rewarded.weights
        return replace(
            rewarded,
            totals=totals + coef * penalty,  # NaN, where no reward applies, stays
            metrics={**rewarded.metrics, PENALTY: Mean.of(coef * penalty)},
            parts=torch.cat([parts, penalty.where(~totals.isnan(), torch.nan).unsqueeze(-1)], -1),
            weights=torch.cat([weights, weights.new_full((1,), coef)]),
        )

    def masked(self, completions: Completions) -> Tensor:
        """Return which completions are left out of the loss, [R] bool on the CPU."""
        is_cut = ~torch.tensor(completions.finished, dtype=torch.bool)
        return is_cut if self.config.truncated == "mask" else torch.zeros_like(is_cut)
