"""One clipped ratio per sequence: the product of the ratios of its tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import SEQUENCE, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "rloo_sequence",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A R, -A clip(R, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most -{clip_ratio_c} A]"
    "; R = product over the sequence of pi / pi_{anchor}",
    facts=LossFacts(
        ratio=f"R, a product, {SEQUENCE}",
        gradient="-A R for each token; where the clip binds, the sequence has 0, which happens soon to long ones",
        source="Ahmadian et al. 2024, arXiv 2402.14740, with the clip of TRL's RLOOTrainer; the paper takes one "
        "step on-policy, where both are the same",
    ),
)
def rloo_sequence(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: AboveOne | None = None,
    anchor: Anchor = "old",
) -> Tensor:
    """Clip the probability ratio of a completion: the completion is the action, as in RLOO.

    ``loss = max(-A R, -A clip(R, 1 - cliprange_low, 1 + cliprange_high))`` with
    ``R = exp(sum over the sequence of log pi_theta - log pi_old)``. Unbiased, but R leaves the range after few steps
    where sequences are long; `gspo` takes the mean instead.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low; 0.2 as in TRL.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 0.2 as in TRL.
        clip_ratio_c: bound of a dual clip of R where A < 0; None: no dual clip.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, the same for all tokens of a sequence with one advantage: a mean per sequence then
        gives the paper's. Reports the fraction of tokens at each bound where it binds.
    """
    return clipped_surrogate(
        t,
        t.product_ratio(anchor),
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )
