"""PPO's clipped surrogate, the policy loss of GRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Gt, Le

from toolkit.functional.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss("vanilla")
def vanilla(
    t: PolicyTerms,
    *,
    cliprange_low: Annotated[float, Ge(0), Le(1)] = 0.2,
    cliprange_high: Annotated[float, Ge(0)] = 0.2,
    clip_ratio_c: Annotated[float, Gt(1)] | None = 3.0,
) -> Tensor:
    """Clip the probability ratio of every token (PPO), with a floor for negative advantages (dual clip).

    ``loss = max(-A r, -A clip(r, 1 - cliprange_low, 1 + cliprange_high))`` with r = pi_theta / pi_old; where A < 0 it
    is cut at ``-c A``, so that a token whose ratio exploded cannot dominate the batch. The default choice; a larger
    `cliprange_high` ("clip-higher") leaves more room to raise rare tokens.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high.
        clip_ratio_c: bound c > 1 of the dual clip, 3.0 as in XTuner and verl; None turns it off.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound where it binds.

    Source: Schulman et al. 2017, arXiv 1707.06347, eq. 7; asymmetric range: Yu et al. 2025, arXiv 2503.14476, eq. 8;
    dual clip: Ye et al. 2020, arXiv 1912.09729, eq. 5. Differs from them in bounding |log r| by 20 nats before exp.
    """
    ratio = t.ratio()
    clipped = ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    t.report("clip_fraction_low", (ratio < 1 - cliprange_low) & (t.advantages < 0))
    t.report("clip_fraction_high", (ratio > 1 + cliprange_high) & (t.advantages > 0))
    losses = (-t.advantages * ratio).maximum(-t.advantages * clipped)
    if clip_ratio_c is None:
        return losses
    t.report("dual_clip_fraction", (ratio > clip_ratio_c) & (t.advantages < 0))
    return losses.minimum(-clip_ratio_c * t.advantages).where(t.advantages < 0, losses)
