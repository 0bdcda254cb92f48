"""REAL: rewards as labels, one classification loss for each group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, Positive
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "real",
    scope="group",
    aggregation="prompt_mean",
    formula="log(1 + sum over the group's sequences with A <= 0 of exp(s / {tau})) + log(1 + sum over those with A > 0 "
    "of exp(-s / {tau})); s = mean over the sequence of log(pi / pi_{anchor}), its A the mean"
    "[<?only_mixed>; 0 for a group without both kinds]",
    facts=LossFacts(
        ratio="the mean log ratio of a sequence is its score in a classification",
        gradient="bounded; A gives the label alone; a completion that is ranked right already has nearly none",
        bound="mean log ratios are held in {range}; the gradient is 0 outside",
        source="REAL, arXiv 2602.05630",
        differs="The advantage only gives the label",
    ),
)
def real(t: PolicyTerms, *, tau: Positive = 0.5, only_mixed: bool = False, anchor: Anchor = "old") -> TokenLosses:
    """Rank the good completions of a prompt above the bad ones: the reward is a label, not a factor.

    Good means a mean advantage above 0. All sequences of a group must be there, and its tokens have the same loss.
    Reports the mean of s where good and of -s where bad.

    Args:
        tau: temperature of the scores, in nats; 0.5 as in ms-swift.
        only_mixed: whether a group with only good or only bad sequences has a loss of 0 (ms-swift).
    """
    score = t.sequence_log_ratio(anchor)
    is_good = t.segment_mean(t.advantages) > 0
    t.report("score_margin", score.where(is_good, -score))
    losses = _softplus_of_sum(t, score / tau, ~is_good) + _softplus_of_sum(t, -score / tau, is_good)
    if not only_mixed:
        return losses
    good = is_good.to(losses.dtype)
    return losses.where((t.group_max(good) > 0) & (t.group_max(1 - good) > 0), 0.0)


def _softplus_of_sum(t: PolicyTerms, values: Tensor, is_member: Tensor) -> Tensor:
    """Return log(1 + sum of exp(values)) over the member sequences of each token's group."""
    values = values.where(is_member, float("-inf"))
    # The largest exponent (that of the 1 included) is factored out, so nothing can overflow.
    largest = t.group_max(values).clamp(min=0)
    return largest + ((-largest).exp() + t.group_sum_of_sequences((values - largest).exp())).log()
