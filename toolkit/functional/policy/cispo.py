"""The bounded ratio as a weight without gradient: CISPO and the truncation of ROLL."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, ClipHigh, ClipLow, NotNegative
from toolkit.functional.policy.facts import WEIGHT, WEIGHT_BOUND, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "cispo",
    formula="-sg(clip(r, [{weight_min} // 1 - {cliprange_low} // 0], [{weight_max} // 1 + {cliprange_high} // inf])) "
    "A log pi[<?use_unified_mask>, 0 where r is above that range with A > 0 or below it with A < 0]; "
    "r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio=f"{WEIGHT}; the weight is clipped",
        gradient="a clipped token still learns: -weight A grad log pi everywhere[<?use_unified_mask> but where PPO"
        " would clip: 0]",
        bound=WEIGHT_BOUND,
        source="MiniMax 2025, arXiv 2506.13585, eq. 4-5; the mask: eq. 6-7",
    ),
)
def cispo(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow | None = 0.2,
    cliprange_high: ClipHigh | None = 0.2,
    weight_min: NotNegative | None = None,
    weight_max: NotNegative | None = None,
    use_unified_mask: bool = False,
    anchor: Anchor = "old",
) -> Tensor:
    """Weight REINFORCE by the clipped probability ratio: a clipped token still learns.

    ``loss = -sg(clip(r, 1 - cliprange_low, 1 + cliprange_high)) A log pi_theta`` with r = pi_theta / pi_old and sg:
    no gradient.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the weight's floor is 1 - cliprange_low; 0.2 as in verl, None for no floor (as the paper's runs).
        cliprange_high: the weight's ceiling is 1 + cliprange_high; 0.2 as in verl, None for no ceiling.
        weight_min: the floor itself, instead of 1 - cliprange_low.
        weight_max: the ceiling itself, instead of 1 + cliprange_high: what TRL, Liger, ms-swift and Tinker mean by
            their upper bound (5 and 4).
        use_unified_mask: skip tokens that PPO would clip: above the ceiling with A > 0, below the floor with
            A < 0 (ROLL; the paper's unified formulation).
        anchor: what the ratio divides by; "rollout" in Tinker, optional in SkyRL.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound.
    """
    floor = 1 - cliprange_low if weight_min is None and cliprange_low is not None else weight_min
    ceiling = 1 + cliprange_high if weight_max is None and cliprange_high is not None else weight_max
    ratio = t.ratio(anchor).detach()
    is_low, is_high = ratio < (0 if floor is None else floor), ratio > (float("inf") if ceiling is None else ceiling)
    t.report("clip_fraction_low", is_low & (t.advantages < 0))
    t.report("clip_fraction_high", is_high & (t.advantages > 0))
    losses = -_within(ratio, floor, ceiling) * t.advantages * t.logprobs
    if not use_unified_mask:
        return losses
    return losses.where(~((is_low & (t.advantages < 0)) | (is_high & (t.advantages > 0))), 0.0)


@register_policy_loss(
    "tis",
    formula="-sg(clip(r, [{weight_min} // 0], [{weight_max} // inf])) A log pi; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio=f"{WEIGHT}; the weight is truncated",
        gradient="a truncated token still learns, with the bound as its weight",
        bound=WEIGHT_BOUND,
        source='ROLL\'s ``pg_variant=tis``; truncation: Ionides 2008, "Truncated importance sampling", and Espeholt'
        " et al. 2018, arXiv 1802.01561",
    ),
)
def tis(
    t: PolicyTerms,
    *,
    weight_min: NotNegative | None = 0.0,
    weight_max: NotNegative | None = 1.0,
    anchor: Anchor = "old",
) -> Tensor:
    """Weight REINFORCE by the truncated probability ratio: a token counts at most as much as on-policy.

    ``loss = -sg(clip(r, weight_min, weight_max)) A log pi_theta`` with r = pi_theta / pi_old. Not the correction of
    the rollout's log-probabilities that other projects call TIS; with ``anchor=rollout weight_max=2`` it is verl's
    REINFORCE of the bypass mode.

    Args:
        t: the tensors of the selected tokens, [N].
        weight_min: floor of the weight; 0 as in ROLL, None: no floor.
        weight_max: ceiling of the weight; 1 as in ROLL, None: no ceiling.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound.
    """
    ratio = t.ratio(anchor).detach()
    t.report("clip_fraction_low", ratio < (0 if weight_min is None else weight_min))
    t.report("clip_fraction_high", ratio > (float("inf") if weight_max is None else weight_max))
    return -_within(ratio, weight_min, weight_max) * t.advantages * t.logprobs


def _within(ratio: Tensor, floor: float | None, ceiling: float | None) -> Tensor:
    return ratio if floor is None and ceiling is None else ratio.clamp(floor, ceiling)
