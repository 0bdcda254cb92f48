"""FIPO: PPO weighted by what the policy does with the tokens that follow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow, Fraction, Positive
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import BINDS, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


UNSAFE_RANGE = (0.8, 1.0)
"""Bounds of the weight of a token that must shrink and has a high ratio already, as in ms-swift."""


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
    clip_ratio_c: AboveOne | None = None,
    delta: AboveOne | None = None,
    half_life: Positive = 32.0,
    weight_range: Fraction | None = 0.2,
    only_raise: bool = True,
    safety_threshold: Positive | None = 4.0,
    anchor: Anchor = "old",
) -> Tensor:
    """Weight PPO's loss of a token by whether the policy came to favour what followed it.

    ``loss = sg(w) max(-A r, -A clip(r, 1 - cliprange_low, 1 + cliprange_high))`` with
    ``w = clip(exp(sum over k >= t of gamma^(k - t) log r_k), 1, 1 + weight_range)``, gamma = 2^(-1 / half_life): credit
    for a token whose continuation is being reinforced, without a value function.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high.
        clip_ratio_c: bound of a dual clip where A < 0; None: no dual clip.
        delta: cap of the ratio that is not clipped (`vanilla`); tokens above it also leave the sum. None: no cap.
        half_life: distance in tokens at which a log ratio counts half; 32 as in the paper.
        weight_range: the weight stays in 1 +- weight_range; None: any weight.
        only_raise: whether the floor of the weight is 1 instead of 1 - weight_range.
        safety_threshold: tokens with A < 0 and a ratio above it have their weight kept in [0.8, 1]; None: no.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean weight.
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
    return weight * clipped_surrogate(
        t,
        ratio,
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
        delta=delta,
    )
