"""GMPO: the geometric mean of clipped ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, NotNegative
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "gmpo",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="-mean(A) exp(mean over the sequence of x); x = log(pi / pi_{anchor}), at most {cliprange_high} where "
    "A > 0, at least -{cliprange_low} where A < 0",
    facts=LossFacts(
        ratio="log ratios are clipped on the side of A's sign; their mean carries the gradient",
        gradient="a clipped token has 0, the others of its sequence go on: -A (geometric mean) / n each",
        source="Zhao et al. 2025, arXiv 2507.20673",
        differs="Where advantages differ inside a sequence, as in verl: the sign is that of each token, the factor "
        "their mean, and a token with A = 0 counts as ratio 1",
    ),
)
def gmpo(
    t: PolicyTerms,
    *,
    cliprange_low: NotNegative = 0.4,
    cliprange_high: NotNegative = 0.4,
    anchor: Anchor = "old",
) -> Tensor:
    """Maximise the geometric mean of a sequence's clipped ratios: one token of large ratio moves it less.

    ``loss = -mean(A) exp(mean over the sequence of x)`` for every token of a sequence, with x the log ratio, at most
    cliprange_high where A > 0 and at least -cliprange_low where A < 0. The range is that of the log ratio.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: floor of the log ratio where A < 0, negated; 0.4 as in the paper, in nats.
        cliprange_high: ceiling of the log ratio where A > 0; 0.4 as in the paper, in nats.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, the same for all tokens of a sequence: a mean per sequence then gives the paper's.
        Reports the fraction of tokens at each bound where it binds.
    """
    log_ratio = t.log_ratio(anchor)
    is_positive, is_negative = t.advantages > 0, t.advantages < 0
    t.report("clip_fraction_low", (log_ratio < -cliprange_low) & is_negative)
    t.report("clip_fraction_high", (log_ratio > cliprange_high) & is_positive)
    clipped = log_ratio.clamp(max=cliprange_high).where(is_positive, log_ratio.clamp(min=-cliprange_low))
    clipped = clipped.where(is_positive | is_negative, 0.0)
    return -t.segment_mean(t.advantages) * t.bounded(t.segment_mean(clipped)).exp()
