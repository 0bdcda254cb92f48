"""PPO's clipped surrogate, the policy loss of GRPO."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import BINDS, CLIPPED, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


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
    clip_ratio_c: AboveOne | None = 3.0,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
) -> Tensor:
    """Clip the probability ratio of every token (PPO), with a floor for negative advantages (dual clip).

    ``loss = max(-A r, -A clip(r, 1 - cliprange_low, 1 + cliprange_high))`` with r = pi_theta / pi_old; where A < 0 it
    is cut at ``-c A``, so a token whose ratio exploded cannot dominate the batch. The default choice; a larger
    `cliprange_high` ("clip-higher") leaves more room to raise rare tokens.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 0.28 in DAPO.
        clip_ratio_c: bound c > 1 of the dual clip, 3.0 as in XTuner and verl; None turns it off, as in PPO and GRPO.
        delta: cap of the ratio in the branch that is not clipped; None: no cap; 4 in INTELLECT-2. The same as
            clip_ratio_c = delta where A < 0, without effect where A > 0 if it is above 1 + cliprange_high.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound where it binds.
    """
    return clipped_surrogate(
        t,
        t.ratio(anchor),
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
        delta=delta,
    )
