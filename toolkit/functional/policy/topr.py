"""TOPR: good examples in full, bad ones only as far as the policy still produces them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, NotNegative
from toolkit.functional.policy.facts import WEIGHT, WEIGHT_BOUND, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


FORMULA = (
    "[<!positive_weight>0 // -[<!positive_weight=1>{positive_weight} ]A log pi] where A > 0, else "
    "[<!negative_weight>0 // -[<!negative_weight=1>{negative_weight} ]sg(clip(%s, {weight_min}, {weight_max})) "
    "A log pi]"
)


@register_policy_loss(
    "topr",
    formula=f"{FORMULA % 'r'}; r = pi / pi_{{anchor}}",
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
    weight_min: NotNegative = 0.0,
    weight_max: NotNegative = 1.0,
    positive_weight: NotNegative = 1.0,
    negative_weight: NotNegative = 1.0,
    anchor: Anchor = "old",
) -> Tensor:
    """Learn from positive advantages in full, and from negative ones by a ratio truncated to at most 1, per token.

    ``loss = -A log pi_theta`` where A > 0, else ``-sg(clip(r, 0, 1)) A log pi_theta``: a bad token that the policy no
    longer produces is ignored, so old data can be used without the collapse of REINFORCE.

    Args:
        t: the tensors of the selected tokens, [N].
        weight_min: floor of the ratio; 0 as in the paper.
        weight_max: ceiling of the ratio; 1 as in the paper.
        positive_weight: factor where A > 0.
        negative_weight: factor elsewhere.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens truncated above.
    """
    return _tapered(t, t.ratio(anchor), t.advantages, weight_min, weight_max, positive_weight, negative_weight)


@register_policy_loss(
    "topr_sequence",
    scope="sequence",
    aggregation="seq_mean_token_sum",
    formula=f"{FORMULA % 'R'}; R = [<?token_ratio>pi / pi_{{anchor}} of the token alone // "
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
    weight_min: NotNegative = 0.0,
    weight_max: NotNegative = 1.0,
    positive_weight: NotNegative = 1.0,
    negative_weight: NotNegative = 1.0,
    token_ratio: bool = False,
    anchor: Anchor = "old",
) -> Tensor:
    """Learn from good sequences in full, and from bad ones by their ratio truncated to at most 1.

    ``loss = -A log pi_theta`` for the tokens of a sequence whose mean advantage is positive, else
    ``-sg(clip(R, 0, 1)) A log pi_theta`` with R the product of the sequence's ratios.

    Args:
        t: the tensors of the selected tokens, [N].
        weight_min: floor of the ratio; 0 as in the paper.
        weight_max: ceiling of the ratio; 1 as in the paper.
        positive_weight: factor for good sequences.
        negative_weight: factor for the others.
        token_ratio: whether R is the ratio of each token, as in ROLL; in the paper it is that of the sequence.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted; the paper sums over the tokens of a sequence
        (seq_mean_token_sum). Reports the fraction of tokens truncated above.
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
