"""PPO's clipped surrogate of any ratio, shared by the losses that differ only in which ratio they clip."""

from __future__ import annotations

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
    is_negative = advantages < 0
    t.report("clip_fraction_low", (ratio < 1 - cliprange_low) & is_negative)
    t.report("clip_fraction_high", (ratio > 1 + cliprange_high) & (advantages > 0))
    capped = ratio
    if delta is not None:
        t.report("delta_clip_fraction", (ratio > max(delta, 1 + cliprange_high)) & is_negative)
        capped = ratio.clamp(max=delta)
    harm = -advantages
    losses = (harm * capped).maximum(harm * ratio.clamp(1 - cliprange_low, 1 + cliprange_high))
    if clip_ratio_c is None:
        return losses
    t.report("dual_clip_fraction", (ratio > clip_ratio_c) & is_negative)
    return losses.minimum(clip_ratio_c * harm).where(is_negative, losses)
