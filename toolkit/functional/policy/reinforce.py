"""REINFORCE, with and without a ratio, and the likelihood of good examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor
from toolkit.functional.policy.facts import NO_RATIO, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

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
def reinforce(t: PolicyTerms) -> Tensor:
    """Raise the log-probability of each token by its advantage: the plain policy gradient.

    ``loss = -A log pi_theta``. For one step per batch: nothing keeps the policy near the old one. GPG is this loss
    with advantages times (sequences / sequences with a non-zero advantage), which belongs to the advantages.

    Args:
        t: the tensors of the selected tokens, [N].

    Returns:
        [N] surrogate to minimise, not yet weighted.
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
def is_reinforce(t: PolicyTerms, *, anchor: Anchor = "old") -> Tensor:
    """Weight each advantage by the probability ratio, without any clip: the importance-sampled policy gradient.

    ``loss = -r A`` with r = pi_theta / pi_old. Unbiased per token; a token whose ratio exploded dominates the batch.

    Args:
        t: the tensors of the selected tokens, [N].
        anchor: what the ratio divides by; "rollout" in Tinker.

    Returns:
        [N] surrogate to minimise, not yet weighted.
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
def nll(t: PolicyTerms, *, only_positive: bool = True) -> Tensor:
    """Raise the log-probability of the tokens that did well, all by the same amount (imitation).

    ``loss = -log pi_theta`` where A > 0, else 0. What OREAL and VAPO add to their policy loss; alone it is rejection
    sampling fine-tuning.

    Args:
        t: the tensors of the selected tokens, [N].
        only_positive: whether only tokens with A > 0 count; False: all do (cross-entropy).

    Returns:
        [N] loss to minimise, not yet weighted. Reports the fraction of tokens that count.
    """
    if not only_positive:
        return -t.logprobs
    is_positive = t.advantages > 0
    t.report("positive_fraction", is_positive)
    return (-t.logprobs).where(is_positive, 0.0)
