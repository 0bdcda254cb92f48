"""ASPO: the inverse ratio for tokens with a positive advantage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


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
    clip_ratio_c: AboveOne | None = 3.0,
    anchor: Anchor = "old",
) -> Tensor:
    """Raise a good token more, the lower its ratio is: its weight is the inverse of its ratio.

    Where A > 0: ``loss = -A sg(min(1 / r, weight_max)) pi / sg(pi)``, and 0 where PPO would clip (r > 1 +
    cliprange_high); its gradient is -A / r, which PPO has as -A r. Elsewhere PPO's clip with dual clip. PPO gives
    larger steps to tokens that are already likely; this keeps the entropy up.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: where A < 0 the ratio's floor is 1 - cliprange_low.
        cliprange_high: where A > 0 tokens with a ratio above 1 + cliprange_high are skipped.
        weight_max: cap of 1 / r; the capped weight keeps a gradient (a soft clip). None: no cap.
        clip_ratio_c: bound of the dual clip where A < 0, a hard one; None: no dual clip.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound where it binds.
    """
    log_ratio = t.log_ratio(anchor)
    ratio = log_ratio.exp()
    losses = clipped_surrogate(
        t,
        ratio,
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )
    is_positive, is_done = t.advantages > 0, ratio > 1 + cliprange_high
    weight = t.bounded(-log_ratio).exp().detach()
    if weight_max is not None:
        t.report("soft_clip_fraction", (weight > weight_max) & is_positive)
        weight = weight.clamp(max=weight_max)
    # exp(0) = 1 with the gradient of log pi.
    flipped = -t.advantages * weight * (t.logprobs - t.logprobs.detach()).exp()
    return flipped.where(~is_done, 0.0).where(is_positive, losses)
