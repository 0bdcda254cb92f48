"""Means of seeds and how sure their differences are: Student's t, with Welch's degrees of freedom."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

QUANTILES = {
    **dict(zip(range(1, 11), (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228), strict=True)),
    **{12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980},
}
"""Degrees of freedom -> 97.5 % quantile of Student's t distribution."""
NORMAL = 1.960
"""The same of the normal distribution, to which it tends."""


@dataclass(frozen=True)
class Difference:
    """A difference of two means with its 95 % confidence interval."""

    value: float
    low: float
    high: float
    is_paired: bool = False
    """Whether runs of the same seed were subtracted first."""

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.low > 0 or self.high < 0


def t_quantile(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t; between tabulated degrees of freedom linear in their inverse."""
    if freedom < 1:
        return math.inf
    below = max(key for key in QUANTILES if key <= freedom)
    above = min((key for key in QUANTILES if key >= freedom), default=None)
    if above == below:
        return QUANTILES[below]
    low, high = QUANTILES[below], NORMAL if above is None else QUANTILES[above]
    part = (1 / below - 1 / freedom) / (1 / below - (0.0 if above is None else 1 / above))
    return low + part * (high - low)


def difference(first: Sequence[float], second: Sequence[float], *, is_paired: bool) -> Difference | None:
    """Return mean(first) - mean(second) with its 95 % interval; None: too few values for one.

    Args:
        first: values of one choice, a seed each.
        second: values of another.
        is_paired: the seeds are the same, in the same order; what they share then falls out of the interval.
    """
    value = fmean(first) - fmean(second)
    if is_paired:
        if len(first) < 2:
            return None
        spread = stdev([x - y for x, y in zip(first, second, strict=True)]) / math.sqrt(len(first))
        half = t_quantile(len(first) - 1) * spread
        return Difference(value, value - half, value + half, is_paired=True)
    if len(first) < 2 or len(second) < 2:
        return None
    parts = [stdev(values) ** 2 / len(values) for values in (first, second)]
    if not sum(parts):
        return Difference(value, value, value)
    # Welch 1947, Biometrika 34: degrees of freedom of a difference with two variances.
    freedom = sum(parts) ** 2 / sum(part**2 / (len(v) - 1) for part, v in zip(parts, (first, second), strict=True))
    half = t_quantile(freedom) * math.sqrt(sum(parts))
    return Difference(value, value - half, value + half)
