"""Kimi k1.5 and DRO: the policy gradient with a quadratic pull back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, NotNegative
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


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
def kimi(t: PolicyTerms, *, tau: NotNegative = 0.1, anchor: Anchor = "old") -> Tensor:
    """Follow the policy gradient with a quadratic penalty on the log ratio instead of a clip.

    ``loss = -A log pi_theta + (tau / 2) (log pi_theta - log pi_old)^2``: the square of the residual of the optimality
    condition log pi / pi_old = A / tau, up to a constant. Works on old data; no ratio is taken, so nothing overflows.

    Args:
        t: the tensors of the selected tokens, [N].
        tau: strength of the pull, in units of the advantage; 0.1 as in ROLL; ``dro_beta`` in verl and Tinker.
        anchor: what the log ratio is against.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean penalty.
    """
    penalty = tau / 2 * t.log_ratio(anchor).square()
    t.report("penalty", penalty)
    return -t.advantages * t.logprobs + penalty
