"""REINFORCE: plain, with a ratio, with a quadratic pull back (Kimi k1.5, DRO); and the likelihood of good examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, NotNegative
from toolkit.functional.policy.facts import NO_RATIO, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "reinforce",
    aliases=("gpg",),
    formula="-A log pi",
    facts=LossFacts(
        ratio=NO_RATIO,
        gradient="-A grad log pi",
        bound="",
        source='Williams 1992, "Simple statistical gradient-following algorithms", eq. 4; GPG: Chu et al. 2025, '
        "arXiv 2504.02546",
    ),
)
def reinforce(t: PolicyTerms) -> TokenLosses:
    """Raise the log-probability of each token by its advantage: the plain policy gradient.

    For one step per batch. GPG is this loss with advantages times (sequences / sequences with a non-zero advantage),
    which belongs to the advantages.
    """
    return -t.advantages * t.logprobs


@register_policy_loss(
    "is_reinforce",
    formula="-r A; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio="r carries the gradient and is not clipped",
        gradient="-A r grad log pi, however large r is: a single token can dominate",
        source="the objective before clipping of Schulman et al. 2017, arXiv 1707.06347, eq. 6; Tinker's "
        "``importance_sampling``",
    ),
)
def is_reinforce(t: PolicyTerms, *, anchor: Anchor = "old") -> TokenLosses:
    """Weight each advantage by the probability ratio, without any clip: the importance-sampled policy gradient.

    Unbiased per token.

    Args:
        anchor: "rollout" in Tinker.
    """
    return -t.ratio(anchor) * t.advantages


@register_policy_loss(
    "nll",
    formula="-log pi[<?only_positive>, 0 where A <= 0]",
    facts=LossFacts(
        ratio=NO_RATIO,
        gradient="-grad log pi [<?only_positive>where A > 0, else 0: only the sign of A is read // everywhere: A "
        "is not read]",
        bound="",
        source="Yue et al. 2025, arXiv 2504.05118 (VAPO)",
        differs="In the paper the mean is over the positive tokens: `positive_nll_coef` and ``per_component`` do "
        "that; ``token_mean`` divides by all",
    ),
)
def nll(t: PolicyTerms, *, only_positive: bool = True) -> TokenLosses:
    """Raise the log-probability of the tokens that did well, all by the same amount (imitation).

    What OREAL and VAPO add to their policy loss; alone it is rejection sampling fine-tuning. Reports the fraction of
    tokens that count.

    Args:
        only_positive: whether only tokens with A > 0 count; False: all do (cross-entropy).
    """
    if not only_positive:
        return -t.logprobs
    is_positive = t.advantages > 0
    t.report("positive_fraction", is_positive)
    return (-t.logprobs).where(is_positive, 0.0)


@register_policy_loss(
    "kimi",
    aliases=("dro",),
    formula="-A log pi[<?tau> + ({tau} / 2) log(pi / pi_{anchor})^2]",
    facts=LossFacts(
        ratio="the log ratio has a quadratic penalty with a gradient",
        gradient="(-A + tau log r) grad log pi[<?tau>: 0 where log r = A / tau, and back beyond]",
        bound="the penalty is computed from log ratios held in {range}; outside it has no gradient, and -A grad "
        "log pi stays",
        source="Kimi Team 2025, arXiv 2501.12599, section 2.3.2; Richemond et al. 2024, arXiv 2405.19107 (DRO)",
        differs="As in verl and ROLL the square is that of each token, not of the sequence",
    ),
)
def kimi(t: PolicyTerms, *, tau: NotNegative = 0.1, anchor: Anchor = "old") -> TokenLosses:
    """Follow the policy gradient with a quadratic penalty on the log ratio instead of a clip.

    The square of the residual of the optimality condition log pi / pi_old = A / tau, up to a constant. Works on old
    data; no ratio is taken, so nothing overflows. Reports the mean penalty.

    Args:
        tau: strength of the pull, in units of the advantage; 0.1 as in ROLL; ``dro_beta`` in verl and Tinker.
    """
    penalty = tau / 2 * t.log_ratio(anchor).square()
    t.report("penalty", penalty)
    return -t.advantages * t.logprobs + penalty
