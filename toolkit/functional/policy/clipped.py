"""PPO's clipped surrogate, the policy loss of GRPO, and losses that change it: ASPO, FIPO, SAPO."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from annotated_types import DocInfo

from toolkit.functional.clamp import with_gradient_where_equal
from toolkit.functional.options import (
    AboveOne,
    Anchor,
    AverageAdvantages,
    ClipHigh,
    ClipLow,
    DualClip,
    Fraction,
    Positive,
)
from toolkit.functional.policy.facts import BINDS, CLIPPED, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms

TauPos = Annotated[Positive, DocInfo("temperature where A > 0; 1.0 as in the paper")]
TauNeg = Annotated[Positive, DocInfo("temperature elsewhere; 1.05 as in the paper")]
UNSAFE_RANGE = (0.8, 1.0)
"""Bounds in FIPO of the weight of a token that must shrink and has a high ratio already, as in ms-swift."""


@register_policy_loss(
    "vanilla",
    formula="max(-A r, -A clip(r, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most -{clip_ratio_c} A]"
    "; r = pi / pi_{anchor}[, at most {delta} where it is not clipped]",
    facts=LossFacts(
        ratio=CLIPPED,
        gradient=f"{BINDS}, else -A r grad log pi",
        source="Schulman et al. 2017, arXiv 1707.06347, eq. 7; asymmetric range: Yu et al. 2025, arXiv 2503.14476,"
        " eq. 8; dual clip: Ye et al. 2020, arXiv 1912.09729, eq. 5; delta: Prime Intellect 2025, arXiv "
        "2505.07291",
    ),
)
def vanilla(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: DualClip | None = 3.0,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Clip the probability ratio of every token (PPO), with a floor for negative advantages (dual clip).

    The default choice. A token with A < 0 whose ratio exploded cannot dominate the batch; a larger `cliprange_high`
    ("clip-higher") leaves more room to raise rare tokens. Reports the fraction of tokens at each bound where it binds.

    Args:
        cliprange_high: 0.28 in DAPO.
        clip_ratio_c: 3.0 as in XTuner and verl; none in PPO and GRPO.
        delta: cap of the ratio in the branch that is not clipped; None: no cap; 4 in INTELLECT-2. The same as
            clip_ratio_c = delta where A < 0, without effect where A > 0 if it is above 1 + cliprange_high.
    """
    return clipped_surrogate(t, t.ratio(anchor), t.advantages, cliprange_low, cliprange_high, clip_ratio_c, delta)


@register_policy_loss(
    "aspo",
    formula="where A > 0: -A sg([min(1 / r, {weight_max}) // 1 / r]) pi / sg(pi), 0 if r > 1 + {cliprange_high}; else "
    "max(-A r, -A clip(r, 1 - {cliprange_low}, 1 + {cliprange_high}))[, at most -{clip_ratio_c} A]; "
    "r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio="where A > 0 the inverse ratio is a weight without gradient; elsewhere r is clipped and carries the "
        "gradient",
        gradient="-A / r where A > 0 (0 above the range; a capped weight goes on learning), PPO's elsewhere",
        bound="{ratios}; the gradient is 0 outside where A <= 0, and the weight where A > 0 takes none from log pi",
        source="Wang et al. 2025, arXiv 2510.06062, section 3.2: mask, flip, clip softly; the flipped ratio is eq. 5",
        differs="The paper's caps are not stated in our source; 3 is that of PPO's dual clip",
    ),
)
def aspo(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    weight_max: AboveOne | None = 3.0,
    clip_ratio_c: DualClip | None = 3.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Raise a good token more, the lower its ratio is: its weight is the inverse of its ratio.

    PPO gives larger steps to tokens that are already likely; this keeps the entropy up. Reports the fraction of tokens
    at each bound where it binds.

    Args:
        cliprange_low: only where A < 0.
        cliprange_high: tokens with A > 0 above it are skipped.
        weight_max: cap of 1 / r; the capped weight keeps a gradient (a soft clip). None: no cap.
    """
    log_ratio = t.log_ratio(anchor)
    ratio = log_ratio.exp()
    losses = clipped_surrogate(t, ratio, t.advantages, cliprange_low, cliprange_high, clip_ratio_c)
    is_positive, is_done = t.advantages > 0, ratio > 1 + cliprange_high
    weight = t.bounded(-log_ratio).exp().detach()
    if weight_max is not None:
        t.report("soft_clip_fraction", (weight > weight_max) & is_positive)
        weight = weight.clamp(max=weight_max)
    # exp(0) = 1 with the gradient of log pi.
    flipped = -t.advantages * weight * (t.logprobs - t.logprobs.detach()).exp()
    return flipped.where(~is_done, 0.0).where(is_positive, losses)


@register_policy_loss(
    "fipo",
    scope="sequence",
    formula="sg(w) (max(-A r, -A clip(r, 1 - {cliprange_low}, 1 + {cliprange_high}))"
    "[, where A < 0 at most -{clip_ratio_c} A]); w = exp(sum over k >= t of 2^(-(k - t) / {half_life}) log r_k)"
    "[<?only_raise>, kept in 1 to 1 + {weight_range} // , kept in 1 - {weight_range} to 1 + {weight_range}]"
    "[, in 0.8 to 1 where A < 0 and r > {safety_threshold}]; r = pi / pi_{anchor}"
    "[, at most {delta} where it is not clipped; 0 stands for log r_k where r_k > {delta}]",
    facts=LossFacts(
        ratio="r is clipped and carries the gradient; those of the following tokens make a weight without gradient",
        gradient=f"{BINDS}, else -w A r grad log pi",
        bound="{ratios}, and so is their sum; the gradient is 0 outside",
        source="FIPO, arXiv 2603.19835; details as in ms-swift",
    ),
)
def fipo(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: DualClip | None = None,
    delta: AboveOne | None = None,
    half_life: Positive = 32.0,
    weight_range: Fraction | None = 0.2,
    only_raise: bool = True,
    safety_threshold: Positive | None = 4.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Weight PPO's loss of a token by whether the policy came to favour what followed it.

    Credit for a token whose continuation is being reinforced, without a value function. Reports the mean weight.

    Args:
        delta: cap of the ratio that is not clipped (`vanilla`); tokens above it also leave the sum. None: no cap.
        half_life: distance in tokens at which a log ratio counts half; 32 as in the paper.
        weight_range: the weight stays in 1 +- weight_range; None: any weight.
        only_raise: whether the floor of the weight is 1 instead of 1 - weight_range.
        safety_threshold: tokens with A < 0 and a ratio above it have their weight kept in [0.8, 1]; None: no.
    """
    log_ratio = t.log_ratio(anchor)
    ratio = log_ratio.exp()
    shift = log_ratio.detach()
    if delta is not None:
        shift = shift.masked_fill(ratio > delta, 0.0)
    weight = t.bounded(t.suffix_sum(shift, 2 ** (-1 / half_life))).exp()
    if weight_range is not None:
        weight = weight.clamp(1.0 if only_raise else 1 - weight_range, 1 + weight_range)
    if safety_threshold is not None:
        is_unsafe = (t.advantages < 0) & (ratio > safety_threshold)
        weight = weight.clamp(*UNSAFE_RANGE).where(is_unsafe, weight)
    t.report("future_weight", weight)
    clipped = clipped_surrogate(t, ratio, t.advantages, cliprange_low, cliprange_high, clip_ratio_c, delta)
    return weight * clipped


def clipped_surrogate(
    t: PolicyTerms,
    ratio: Tensor,
    advantages: Tensor,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None = None,
    delta: float | None = None,
) -> Tensor:
    """Return the loss of `vanilla`, [N], for any finite `ratio` [N] and `advantages` [N]; `t` gets its reports."""
    floor, ceiling = 1 - cliprange_low, 1 + cliprange_high
    free = math.inf if delta is None else delta
    largest, cap = max(free, ceiling), min(free, ceiling)
    held = largest if clip_ratio_c is None else min(largest, clip_ratio_c)
    is_negative, fixed = advantages < 0, ratio.detach()
    # The larger loss is -A times the larger of the two ratios where A < 0, and times the smaller elsewhere.
    clipped = fixed.clamp(floor, held).where(is_negative, fixed.clamp(max=cap))
    t.report("clip_fraction_low", lambda: clipped > fixed)  # where A < 0: nothing else raises a ratio
    t.report("clip_fraction_high", lambda: (fixed > ceiling) & (advantages > 0))
    if delta is not None:
        t.report("delta_clip_fraction", lambda: (fixed > largest) & is_negative)
    if clip_ratio_c is not None:
        t.report("dual_clip_fraction", lambda: (fixed > clip_ratio_c) & is_negative)
    return -advantages * with_gradient_where_equal(clipped, ratio)


@register_policy_loss(
    "sapo",
    aggregation="seq_mean_token_mean",
    formula="-(4 / tau) sigmoid(tau (r - 1)) A, tau = {tau_pos} where A > 0, else {tau_neg}; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio="r passes a smooth gate and carries the gradient",
        gradient="-4 g (1 - g) r A, g the sigmoid: -A at r = 1, towards 0 on both sides, never exactly 0",
        source="Gao et al. 2025, arXiv 2511.20347",
    ),
)
def sapo(t: PolicyTerms, *, tau_pos: TauPos = 1.0, tau_neg: TauNeg = 1.05, anchor: Anchor = "old") -> TokenLosses:
    """Fade a token out smoothly as its ratio leaves 1, faster where its advantage is negative.

    The value at r = 1 is -2 A / tau, not -A. Reports the mean of 4 g (1 - g), g the sigmoid.
    """
    return _gated(t, t.ratio(anchor), t.advantages, tau_pos, tau_neg)


@register_policy_loss(
    "sapo_sequence",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="-(4 / tau) sigmoid(tau (s - 1)) A, tau = {tau_pos} where A > 0, else {tau_neg}; "
    "s = exp(mean over the sequence of log(pi / pi_{anchor}))[<?average_advantages>; A is the mean of the sequence's]",
    facts=LossFacts(
        ratio="s, one per sequence, passes a smooth gate and carries the gradient",
        gradient="flows through the mean of the sequence; fades smoothly as s leaves 1",
        source="AReaL's ``sapo`` with ``importance_sampling_level=sequence``; after Gao et al. 2025, arXiv 2511.20347",
    ),
)
def sapo_sequence(
    t: PolicyTerms,
    *,
    tau_pos: TauPos = 1.0,
    tau_neg: TauNeg = 1.05,
    average_advantages: AverageAdvantages = True,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Fade a sequence out smoothly as the geometric mean of its ratios leaves 1.

    Reports the mean of 4 g (1 - g), g the sigmoid.
    """
    advantages = t.segment_mean(t.advantages) if average_advantages else t.advantages
    return _gated(t, t.sequence_ratio(anchor), advantages, tau_pos, tau_neg)


def _gated(t: PolicyTerms, ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    tau = (advantages > 0).to(ratio.dtype) * (tau_pos - tau_neg) + tau_neg
    gate = (tau * (ratio - 1)).sigmoid()
    t.report("gate", 4 * gate * (1 - gate))
    return -4 / tau * gate * advantages
