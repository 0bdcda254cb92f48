"""Clip-cov and KL-cov: hold back the few tokens that make the entropy collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, ClipHigh, ClipLow, DualClip, Fraction, NotNegative
from toolkit.functional.policy.clipped import clipped_surrogate
from toolkit.functional.policy.facts import BINDS, CLIPPED, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "clip_cov",
    scope="batch",
    formula="max(-A r, -A clip(r, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most -{clip_ratio_c} A]"
    ", 0 for a share {clip_cov_ratio} of tokens, drawn where "
    "{cov_low} < (A - mean A)(log pi - mean log pi) < {cov_high}; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio=CLIPPED,
        gradient=f"{BINDS} and for the tokens that are drawn, else -A r grad log pi",
        source="Cui et al. 2025, arXiv 2505.22617",
        differs="The draw is reproducible: it depends on the advantages and `seed` alone",
    ),
)
def clip_cov(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: DualClip | None = None,
    clip_cov_ratio: Fraction = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    seed: int = 0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Remove the gradient of a few random tokens whose log-probability and advantage move together.

    PPO's loss, 0 for ``max(1, int(clip_cov_ratio N))`` tokens drawn among those that are not clipped, where N and the
    means are of all tokens of the step. These tokens make the entropy fall; holding back very few of them keeps it.
    Reports the fraction of tokens at each bound and of those drawn.

    Args:
        clip_ratio_c: none in the paper.
        clip_cov_ratio: share of all tokens that lose their gradient; 2e-4 as in the paper.
        cov_low: smallest covariance of a token that may be drawn; 1 as in the paper.
        cov_high: largest; 5 as in the paper.
        seed: seed of the draw. The same seed draws the same tokens on every device and rank.
    """
    ratio = t.ratio(anchor)
    losses = clipped_surrogate(t, ratio, t.advantages, cliprange_low, cliprange_high, clip_ratio_c)
    is_clipped = ((ratio < 1 - cliprange_low) & (t.advantages < 0)) | (
        (ratio > 1 + cliprange_high) & (t.advantages > 0)
    )
    covariance = _covariance(t)
    is_eligible = (covariance > cov_low) & (covariance < cov_high) & ~is_clipped
    is_drawn = t.selected_at_random(is_eligible, max(1, int(clip_cov_ratio * len(losses))), seed)
    t.report("clip_cov_fraction", is_drawn)
    return losses.where(~is_drawn, 0.0)


@register_policy_loss(
    "kl_cov",
    scope="batch",
    formula="-A r[<?kl_coef><?kl_cov_ratio>, + [<!kl_coef=1>{kl_coef} ]|log r| for the share {kl_cov_ratio} of tokens "
    "with the largest (A - mean A)(log pi - mean log pi)]; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio="r carries the gradient and is not clipped",
        gradient="-A r grad log pi, for the penalised tokens also that of |log r|",
        source="Cui et al. 2025, arXiv 2505.22617",
    ),
)
def kl_cov(
    t: PolicyTerms,
    *,
    kl_cov_ratio: Fraction = 2e-4,
    kl_coef: NotNegative = 1.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Hold the few tokens of the largest covariance near the old policy, and clip nothing.

    These are ``max(1, int(kl_cov_ratio N))`` tokens, where N and the means are of all tokens of the step. The penalty
    is part of the token's loss and weighted like it. Reports the mean |log r| of the penalised tokens.

    Args:
        kl_cov_ratio: share of all tokens that are penalised; 2e-4 as in the paper for 32B models, 2e-3 for 7B; 0: none.
        kl_coef: factor of the penalty; 1 as in the paper.
    """
    log_ratio = t.log_ratio(anchor)
    losses = -t.advantages * log_ratio.exp()
    count = 0 if kl_cov_ratio == 0 else min(len(losses), max(1, int(kl_cov_ratio * len(losses))))
    penalised = _covariance(t).topk(count).indices
    penalty = log_ratio.abs()[penalised]
    t.report("kl_cov_penalty", penalty)
    return losses.index_add(0, penalised, kl_coef * penalty)


def _covariance(t: PolicyTerms) -> Tensor:
    """Return each token's share of the covariance of advantage and log-probability, [N], without gradient."""
    logprobs = t.logprobs.detach()
    return (t.advantages - t.advantages.mean()) * (logprobs - logprobs.mean())
