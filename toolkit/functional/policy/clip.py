"""PPO's clipped surrogate of any ratio, shared by the losses that differ only in which ratio they clip."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


def clipped_surrogate(
    t: PolicyTerms,
    ratio: Tensor,
    advantages: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """Take the larger loss of the ratio and of the clipped ratio, and bound it where the advantage is negative.

    ``max(-A min(x, delta), -A clip(x, 1 - cliprange_low, 1 + cliprange_high))``; where A < 0 at most
    ``-clip_ratio_c A``. With delta = clip_ratio_c > 1 + cliprange_high the two bounds are the same loss.

    Args:
        t: receives the reports.
        ratio: [N] x, finite.
        advantages: [N] A.
        cliprange_low: the ratio's floor is 1 minus it.
        cliprange_high: the ratio's ceiling is 1 plus it.
        clip_ratio_c: bound of the dual clip; None: no dual clip.
        delta: cap of the ratio that is not clipped; None: no cap.

    Returns:
        [N] surrogate to minimise. Reports the fraction of tokens at each bound where it binds.
    """
    floor, ceiling = 1 - cliprange_low, 1 + cliprange_high
    free = math.inf if delta is None else delta
    largest = max(free, ceiling)
    is_negative = advantages < 0
    t.report("clip_fraction_low", (ratio < floor) & is_negative)
    t.report("clip_fraction_high", (ratio > ceiling) & (advantages > 0))
    if delta is not None:
        t.report("delta_clip_fraction", (ratio > largest) & is_negative)
    if clip_ratio_c is not None:
        t.report("dual_clip_fraction", (ratio > clip_ratio_c) & is_negative)
        largest = min(largest, clip_ratio_c)
    # The larger loss is -A times the larger of the two ratios where A < 0, and times the smaller elsewhere.
    cap = min(free, ceiling)
    return -advantages * ratio.clamp(floor, largest).where(is_negative, ratio.clamp(max=cap))
