"""CISPO: the clipped ratio is a weight without gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from toolkit.functional.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss("cispo")
def cispo(
    t: PolicyTerms,
    *,
    cliprange_low: Annotated[float, Ge(0), Le(1)] | None = 0.2,
    cliprange_high: Annotated[float, Ge(0)] | None = 0.2,
) -> Tensor:
    """Weight REINFORCE by the clipped probability ratio: a clipped token still learns.

    ``loss = -sg(clip(r, 1 - cliprange_low, 1 + cliprange_high)) A log pi_theta`` with r = pi_theta / pi_old and sg:
    no gradient.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the weight's floor is 1 - cliprange_low; 0.2 as in verl, None for no floor (as the paper's runs).
        cliprange_high: the weight's ceiling is 1 + cliprange_high; 0.2 as in verl, None for no ceiling.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound.

    Source: MiniMax 2025, arXiv 2506.13585, eq. 4-5. Differs in bounding |log r| by 20 nats before exp.
    """
    ratio = t.ratio().detach()
    low = None if cliprange_low is None else 1 - cliprange_low
    high = None if cliprange_high is None else 1 + cliprange_high
    t.report("clip_fraction_low", ratio < (-1 if low is None else low))
    t.report("clip_fraction_high", ratio > (float("inf") if high is None else high))
    weight = ratio if low is None and high is None else ratio.clamp(low, high)
    return -weight * t.advantages * t.logprobs
