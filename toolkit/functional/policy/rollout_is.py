"""The ratio to the sampler as a weight, zero outside an open interval."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, ClipHigh, ClipLow
from toolkit.functional.policy.facts import WEIGHT, WEIGHT_BOUND, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "rollout_is",
    formula="-sg(r) A log pi where 1 - {cliprange_low} < r < 1 + {cliprange_high}, else 0; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio=f"{WEIGHT}, and decides by itself which tokens count",
        gradient="exactly 0 outside the open range, else -r A grad log pi (a clamp instead of the mask would leave"
        " a gradient)",
        bound=WEIGHT_BOUND,
        source='SkyRL\'s ``rollout_is``; the hard mask: Ling Team 2025, "IcePop"',
        differs="Unlike with a clamped ratio, a token outside has no gradient",
    ),
)
def rollout_is(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    anchor: Anchor = "rollout",
) -> Tensor:
    """Weight REINFORCE by the ratio to the policy that sampled, and skip tokens where it is far from 1.

    ``loss = -sg(r) A log pi_theta`` with r = pi_theta / pi_rollout where 1 - cliprange_low < r < 1 + cliprange_high,
    else 0. One ratio corrects both for the age of the policy and for the mismatch of sampler and trainer.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio must be above 1 - cliprange_low; 0.2 as in SkyRL.
        cliprange_high: the ratio must be below 1 + cliprange_high; 0.2 as in SkyRL.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens skipped on each side.
    """
    ratio = t.ratio(anchor).detach()
    is_low, is_high = ratio <= 1 - cliprange_low, ratio >= 1 + cliprange_high
    t.report("mask_fraction_low", is_low)
    t.report("mask_fraction_high", is_high)
    return (-ratio * t.advantages * t.logprobs).where(~(is_low | is_high), 0.0)
