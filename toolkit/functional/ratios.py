"""Probability ratios that cannot overflow. N: selected tokens."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from toolkit.functional.clamp import with_gradient_where_equal
from toolkit.functional.names import MAX_LOG_RATIO

HEADROOM = 20.0
"""Nats between the largest ratio and the largest number of the dtype."""


def bounded(log_ratio: Tensor, low: float | None = -MAX_LOG_RATIO, high: float | None = MAX_LOG_RATIO) -> Tensor:
    """Return `log_ratio` [N], in nats and fp32 or wider, clamped to [low, high]; its gradient is exactly 0 outside.

    Clamping *before* exp keeps inf out of the graph: ``where(ok, exp(x), 0)`` would have a finite value and a NaN
    gradient. With ``high=None`` the ceiling is what the dtype can hold after exp and some arithmetic (68.7 in fp32).
    """
    # An infinite ratio times an advantage of 0 would be NaN; the headroom is for advantages, weights and sums.
    largest = _largest_log(log_ratio.dtype) - HEADROOM
    high = largest if high is None else min(high, largest)
    if not log_ratio.requires_grad:
        return log_ratio.clamp(low, high)
    return with_gradient_where_equal(log_ratio.detach().clamp(low, high), log_ratio)


@cache
def _largest_log(dtype: torch.dtype) -> float:
    return math.log(torch.finfo(dtype).max)
