"""Clip-cov and KL-cov: hold back the few tokens that make the entropy collapse."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow, Fraction, NotNegative
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import BINDS, CLIPPED, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

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
    clip_ratio_c: AboveOne | None = None,
    clip_cov_ratio: Fraction = 2e-4,
    cov_low: float = 1.0,
    cov_high: float = 5.0,
    seed: int = 0,
    anchor: Anchor = "old",
) -> Tensor:
    """Remove the gradient of a few random tokens whose log-probability and advantage move together.

    PPO's loss, 0 for ``max(1, int(clip_cov_ratio N))`` tokens drawn among those with
    ``cov_low < (A - mean A)(log pi - mean log pi) < cov_high`` that are not clipped. These tokens make the
    entropy fall; holding back very few of them keeps it.

    Args:
        t: the tensors of the selected tokens, [N]; the means are over these: all of the step.
        cliprange_low: the ratio's floor is 1 - cliprange_low.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high.
        clip_ratio_c: bound of a dual clip where A < 0; None: no dual clip, as in the paper.
        clip_cov_ratio: share of all tokens that lose their gradient; 2e-4 as in the paper.
        cov_low: smallest covariance of a token that may be drawn; 1 as in the paper.
        cov_high: largest; 5 as in the paper.
        seed: seed of the draw. The same seed draws the same tokens on every device and rank.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the fraction of tokens at each bound and of those drawn.
    """
    ratio = t.ratio(anchor)
    losses = clipped_surrogate(
        t,
        ratio,
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )
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
) -> Tensor:
    """Hold the few tokens of the largest covariance near the old policy, and clip nothing.

    ``loss = -A r``, plus ``kl_coef |log r|`` for the ``max(1, int(kl_cov_ratio N))`` tokens with the largest
    ``(A - mean A)(log pi - mean log pi)``. The penalty is part of the token's loss and weighted like it.

    Args:
        t: the tensors of the selected tokens, [N]; the means are over these: all of the step.
        kl_cov_ratio: share of all tokens that are penalised; 2e-4 as in the paper for 32B models, 2e-3 for 7B; 0: none.
        kl_coef: factor of the penalty; 1 as in the paper.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean |log r| of the penalised tokens.
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
