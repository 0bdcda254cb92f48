"""The ratio as a weight without gradient: CISPO, the truncation of ROLL, the interval of SkyRL, TOPR, VESPO."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Annotated

from annotated_types import DocInfo

from toolkit.functional.options import Anchor, ClipHigh, ClipLow, NotNegative, Positive
from toolkit.functional.policy.facts import WEIGHT, WEIGHT_BOUND, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms

LOG_WEIGHT_MIN, LOG_WEIGHT_MAX = log(1e-8), 20.0
"""Bounds of the sequence's log weight in VESPO, in nats, as in TRL; the second also of each token's log ratio."""
WeightMin = Annotated[NotNegative, DocInfo("floor of the ratio; 0 as in the paper")]
WeightMax = Annotated[NotNegative, DocInfo("ceiling of the ratio; 1 as in the paper")]
PositiveWeight = Annotated[NotNegative, DocInfo("factor where A > 0")]
NegativeWeight = Annotated[NotNegative, DocInfo("factor elsewhere")]
TOPR = (
    "[<!positive_weight>0 // -[<!positive_weight=1>{positive_weight} ]A log pi] where A > 0, else "
    "[<!negative_weight>0 // -[<!negative_weight=1>{negative_weight} ]sg(clip(%s, {weight_min}, {weight_max})) "
    "A log pi]"
)


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
) -> TokenLosses:
    """Weight REINFORCE by the clipped probability ratio: a clipped token still learns.

    Reports the fraction of tokens at each bound, of either sign of A; with `use_unified_mask` those that are skipped.
    `soft_clip_fraction` are those at the ceiling with A > 0, which TRL and ms-swift call cispo_clip_ratio.

    Args:
        cliprange_low: 0.2 as in verl, None for no floor (as the paper's runs).
        cliprange_high: 0.2 as in verl, None for no ceiling.
        weight_min: the floor itself, instead of 1 - cliprange_low.
        weight_max: the ceiling itself, instead of 1 + cliprange_high: what TRL, Liger, ms-swift and Tinker mean by
            their upper bound (5 and 4).
        use_unified_mask: skip tokens that PPO would clip: above the ceiling with A > 0, below the floor with
            A < 0 (ROLL; the paper's unified formulation).
        anchor: "rollout" in Tinker, optional in SkyRL.
    """
    floor = 1 - cliprange_low if weight_min is None and cliprange_low is not None else weight_min
    ceiling = 1 + cliprange_high if weight_max is None and cliprange_high is not None else weight_max
    weight, is_low, is_high = _clipped(t, anchor, floor, ceiling)
    is_above = is_high & (t.advantages > 0)
    if use_unified_mask:
        is_low, is_high = is_low & (t.advantages < 0), is_above
    t.report("clip_fraction_low", is_low)
    t.report("clip_fraction_high", is_high)
    t.report("soft_clip_fraction", is_above)
    losses = -weight * t.advantages * t.logprobs
    return losses.where(~(is_low | is_high), 0.0) if use_unified_mask else losses


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
) -> TokenLosses:
    """Weight REINFORCE by the truncated probability ratio: a token counts at most as much as on-policy.

    Not the correction of the rollout's log-probabilities that other projects call TIS; with ``anchor=rollout
    weight_max=2`` it is verl's REINFORCE of the bypass mode. Reports the fraction of tokens at each bound.

    Args:
        weight_min: floor of the weight; 0 as in ROLL, None: no floor.
        weight_max: ceiling of the weight; 1 as in ROLL, None: no ceiling.
    """
    weight, is_low, is_high = _clipped(t, anchor, weight_min, weight_max)
    t.report("clip_fraction_low", is_low)
    t.report("clip_fraction_high", is_high)
    return -weight * t.advantages * t.logprobs


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
) -> TokenLosses:
    """Weight REINFORCE by the ratio to the policy that sampled, and skip tokens where it is far from 1.

    One ratio corrects both for the age of the policy and for the mismatch of sampler and trainer. Reports the fraction
    of tokens skipped on each side.

    Args:
        cliprange_low: tokens at it or below are skipped; 0.2 as in SkyRL.
        cliprange_high: tokens at it or above are skipped; 0.2 as in SkyRL.
    """
    ratio = t.ratio(anchor).detach()
    is_low, is_high = ratio <= 1 - cliprange_low, ratio >= 1 + cliprange_high
    t.report("mask_fraction_low", is_low)
    t.report("mask_fraction_high", is_high)
    return (-ratio * t.advantages * t.logprobs).where(~(is_low | is_high), 0.0)


def _clipped(
    t: PolicyTerms, anchor: Anchor, floor: float | None, ceiling: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clipped ratio without gradient, where it was below the floor and where above the ceiling, [N] each."""
    ratio = t.ratio(anchor).detach()
    weight = ratio if floor is None and ceiling is None else ratio.clamp(floor, ceiling)
    return weight, ratio < weight, ratio > weight


@register_policy_loss(
    "topr",
    formula=f"{TOPR % 'r'}; r = pi / pi_{{anchor}}",
    facts=LossFacts(
        ratio=f"{WEIGHT} where A <= 0 and absent where A > 0",
        gradient="-A grad log pi where A > 0, however old the sample; else faded with the ratio",
        bound=WEIGHT_BOUND,
        source="Le Roux et al. 2025, arXiv 2503.14286, eq. 8, with the ratio of each token as in ROLL; "
        "`topr_sequence` is the paper's",
    ),
)
def topr(
    t: PolicyTerms,
    *,
    weight_min: WeightMin = 0.0,
    weight_max: WeightMax = 1.0,
    positive_weight: PositiveWeight = 1.0,
    negative_weight: NegativeWeight = 1.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Learn from positive advantages in full, and from negative ones by a ratio truncated to at most 1, per token.

    A bad token that the policy no longer produces is ignored, so old data can be used without the collapse of
    REINFORCE. Reports the fraction of tokens truncated above.
    """
    return _tapered(t, t.ratio(anchor), t.advantages, weight_min, weight_max, positive_weight, negative_weight)


@register_policy_loss(
    "topr_sequence",
    scope="sequence",
    aggregation="seq_mean_token_sum",
    formula=f"{TOPR % 'R'}; R = [<?token_ratio>pi / pi_{{anchor}} of the token alone // "
    "product over the sequence of pi / pi_{anchor}]; whether A > 0 is asked of the sequence's mean",
    facts=LossFacts(
        ratio="R, [<?token_ratio>one for each token // one for a sequence], is a weight without gradient for "
        "sequences with A <= 0 and absent for the others",
        gradient="-A grad log pi for good sequences; bad ones fade with [<?token_ratio>each token's ratio // their"
        " product of ratios]",
        bound=WEIGHT_BOUND,
        source="Le Roux et al. 2025, arXiv 2503.14286, eq. 8",
    ),
)
def topr_sequence(
    t: PolicyTerms,
    *,
    weight_min: WeightMin = 0.0,
    weight_max: WeightMax = 1.0,
    positive_weight: PositiveWeight = 1.0,
    negative_weight: NegativeWeight = 1.0,
    token_ratio: bool = False,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Learn from good sequences in full, and from bad ones by their ratio truncated to at most 1.

    A sequence is good if its mean advantage is positive. Reports the fraction of tokens truncated above.

    Args:
        token_ratio: whether R is the ratio of each token, as in ROLL; in the paper it is that of the sequence.
    """
    score = t.segment_mean(t.advantages)
    ratio = t.ratio(anchor) if token_ratio else t.product_ratio(anchor)
    return _tapered(t, ratio, score, weight_min, weight_max, positive_weight, negative_weight)


def _tapered(
    t: PolicyTerms,
    ratio: Tensor,
    score: Tensor,
    weight_min: float,
    weight_max: float,
    positive_weight: float,
    negative_weight: float,
) -> Tensor:
    is_positive, ratio = score > 0, ratio.detach()
    t.report("clip_fraction_high", (ratio > weight_max) & (score < 0))
    weight = negative_weight * ratio.clamp(weight_min, weight_max)
    return -weight.masked_fill(is_positive, positive_weight) * t.advantages * t.logprobs


@register_policy_loss(
    "vespo",
    scope="sequence",
    formula="-sg(w^k exp(lambda (1 - w))) A log pi; w = product over the sequence of pi / pi_{anchor}"
    "[<?use_rollout_weight> x [min(pi_old / pi_rollout, {rollout_weight_max}) // pi_old / pi_rollout]]; (k, lambda) = "
    "({k_pos}, {lambda_pos}) where A >= 0, else ({k_neg}, {lambda_neg})",
    facts=LossFacts(
        ratio="w, one for a sequence, shapes a weight without gradient",
        gradient="-phi(w) A grad log pi; phi has its peak near w = 1 and goes to 0 on both sides, never exactly 0",
        bound="each token's log ratio is held in {range} and within +-20, log w between -18.4 and 20; this takes "
        "no gradient from log pi",
        source="VESPO, arXiv 2602.10693",
    ),
)
def vespo(
    t: PolicyTerms,
    *,
    k_pos: NotNegative = 2.0,
    lambda_pos: NotNegative = 3.0,
    k_neg: NotNegative = 3.0,
    lambda_neg: NotNegative = 2.0,
    use_rollout_weight: bool = False,
    rollout_weight_max: Positive | None = 2.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Weight REINFORCE by a smooth function of the sequence's ratio that has its peak near 1.

    Nothing has to be clipped. Reports the mean of phi, the weight, which is 1 at w = 1.

    Args:
        k_pos: power of w where A >= 0; 2 as in TRL.
        lambda_pos: rate where A >= 0; 3 as in TRL.
        k_neg: power of w where A < 0; 3 as in TRL.
        lambda_neg: rate where A < 0; 2 as in TRL.
        use_rollout_weight: whether w also has the factors pi_old / pi_rollout of its tokens, as TRL multiplies its
            rollout correction inside; needs rollout_logprobs. Then use no other correction.
        rollout_weight_max: cap of each of these factors; None: no cap.
    """
    log_weight = t.log_ratio(anchor).detach().clamp(-LOG_WEIGHT_MAX, LOG_WEIGHT_MAX)
    if use_rollout_weight:
        log_rollout = t.old_logprobs - t.require("rollout_logprobs")
        ceiling = LOG_WEIGHT_MAX if rollout_weight_max is None else min(log(rollout_weight_max), LOG_WEIGHT_MAX)
        log_weight = log_weight + log_rollout.clamp(LOG_WEIGHT_MIN, ceiling)
    log_weight = t.segment_sum(log_weight).clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)
    is_positive = (t.advantages >= 0).to(log_weight.dtype)
    k = is_positive * (k_pos - k_neg) + k_neg
    rate = is_positive * (lambda_pos - lambda_neg) + lambda_neg
    phi = (k * log_weight + rate * (1 - log_weight.exp())).clamp(max=LOG_WEIGHT_MAX).exp()
    t.report("phi", phi)
    return -phi * t.advantages * t.logprobs
