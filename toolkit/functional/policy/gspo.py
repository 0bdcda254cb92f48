"""GSPO: one clipped ratio for a whole sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from annotated_types import Ge, Le

from toolkit.functional.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss("gspo", scope="sequence")
def gspo(
    t: PolicyTerms,
    *,
    cliprange_low: Annotated[float, Ge(0), Le(1)] = 3e-4,
    cliprange_high: Annotated[float, Ge(0)] = 4e-4,
) -> Tensor:
    """Clip the geometric mean of the probability ratios of a sequence.

    ``loss = max(-A s, -A clip(s, 1 - cliprange_low, 1 + cliprange_high))`` for every token of a sequence, with
    ``s = exp(mean over the sequence of log pi_theta - log pi_old)``. The gradient flows through the mean.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low; 3e-4 as in the paper, for s moves far less than r.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 4e-4 as in the paper.

    Returns:
        [N] surrogate to minimise, the same for all tokens of a sequence with one advantage. Reports the fraction of
        tokens at each bound where it binds.

    Source: Zheng et al. 2025, arXiv 2507.18071, eq. 5-7. Differs in bounding |log s| by 20 nats before exp. The paper
    averages over sequences; here the aggregation is chosen apart from the loss.
    """
    ratio = t.sequence_ratio()
    clipped = ratio.clamp(1 - cliprange_low, 1 + cliprange_high)
    t.report("clip_fraction_low", (ratio < 1 - cliprange_low) & (t.advantages < 0))
    t.report("clip_fraction_high", (ratio > 1 + cliprange_high) & (t.advantages > 0))
    return (-t.advantages * ratio).maximum(-t.advantages * clipped)
