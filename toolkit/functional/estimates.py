"""Estimates from repeated measurements, with 95% intervals: pass@k, shares and means over prompts.

All are plain numbers: an evaluation has a few hundred of them, on the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.96
"""Standard errors on either side of a 95% interval: the 0.975 quantile of the normal distribution."""


class MeanEstimate(NamedTuple):
    """A mean of independent values."""

    mean: float
    standard_error: float | None
    """None: of a single value."""

    def interval(self, low: float = -math.inf, high: float = math.inf) -> tuple[float, float] | None:
        """Return mean -+ 1.96 standard errors, cut at the bounds of the values.

        None where nothing shows how much the values vary: there is one, or all are equal.
        """
        if not self.standard_error:
            return None
        half = Z * self.standard_error
        return max(self.mean - half, low), min(self.mean + half, high)


def unbiased_pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Return the chance that at least one of k samples passes, without bias, from more samples than k.

    1 - C(n - c, k) / C(n, k) for c of n samples that pass: the share of the subsets of k samples with one that passes.
    Computed from whole numbers, so it is right to the last bit for any n. 1 - (1 - c/n)^k is biased downwards.

    Args:
        num_samples: n, at least k.
        num_passed: c, from 0 to n.
        k: at least 1.
    Source: Chen et al. 2021, arXiv 2107.03374, eq. 1; their code multiplies 1 - k/i instead.
    """
    if not (1 <= k <= num_samples and 0 <= num_passed <= num_samples):
        raise ValueError(f"pass@{k} of {num_passed} passed in {num_samples} samples: it needs 1 <= k <= the samples")
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_passed, k)) / subsets


def wilson_interval(num_passed: int, number: int) -> tuple[float, float]:
    """Return the 95% interval of a share, given how many of `number` independent trials passed.

    (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n). Unlike p -+ z sqrt(p(1-p)/n), it has a width at 0 and 1,
    and stays between them.

    Source: Wilson 1927, Journal of the American Statistical Association 22 (158), 209-212.
    """
    if not 0 <= num_passed <= number or number == 0:
        raise ValueError(f"{num_passed} of {number} trials is not a share")
    share, square = num_passed / number, Z * Z
    center = share + square / (2 * number)
    half = Z * math.sqrt(share * (1 - share) / number + square / (4 * number * number))
    scale = 1 + square / number
    low = (center - half) / scale if num_passed else 0.0  # rounding would leave 1e-17
    high = (center + half) / scale if num_passed < number else 1.0
    return low, high


def mean_estimate(values: Sequence[float]) -> MeanEstimate:
    """Return the mean of independent values and its standard error, with n - 1 in the variance.

    Where several measurements share a prompt, give one value for each prompt: completions of one prompt are not
    independent, and an interval over all of them would be too short.

    Source: Miller 2024, arXiv 2411.00640, sections 2.1 and 2.2.
    """
    number = len(values)
    if not number:
        raise ValueError("there are no values to average")
    mean = math.fsum(values) / number  # exact, so the order of the values does not matter
    if number == 1:
        return MeanEstimate(mean, None)
    variance = math.fsum((value - mean) ** 2 for value in values) / (number - 1)
    return MeanEstimate(mean, math.sqrt(variance / number))
