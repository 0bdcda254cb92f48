"""SAPO: a soft gate instead of the clip."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, Positive
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "sapo",
    aggregation="seq_mean_token_mean",
    formula="-(4 / tau) sigmoid(tau (r - 1)) A, tau = {tau_pos} where A > 0, else {tau_neg}; r = pi / pi_{anchor}",
    facts=LossFacts(
        ratio="r passes a smooth gate and carries the gradient",
        gradient="-4 g (1 - g) r A, g the sigmoid: -A at r = 1, towards 0 on both sides, never exactly 0",
        source="Gao et al. 2025, arXiv 2511.20347",
    ),
)
def sapo(t: PolicyTerms, *, tau_pos: Positive = 1.0, tau_neg: Positive = 1.05, anchor: Anchor = "old") -> Tensor:
    """Fade a token out smoothly as its ratio leaves 1, faster where its advantage is negative.

    ``loss = -(4 / tau) sigmoid(tau (r - 1)) A`` with tau = tau_pos where A > 0, else tau_neg. Its gradient is
    ``-4 g (1 - g) r A`` with g the sigmoid: -A at r = 1, towards 0 on both sides. Note that the value at r = 1 is
    -2 A / tau, not -A.

    Args:
        t: the tensors of the selected tokens, [N].
        tau_pos: temperature where A > 0; 1.0 as in the paper.
        tau_neg: temperature elsewhere; 1.05 as in the paper.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean of 4 g (1 - g).
    """
    return _gated(t, t.ratio(anchor), t.advantages, tau_pos, tau_neg)


@register_policy_loss(
    "sapo_sequence",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="-(4 / tau) sigmoid(tau (s - 1)) A, tau = {tau_pos} where A > 0, else {tau_neg}; "
    "s = exp(mean over the sequence of log(pi / pi_{anchor}))[<?average_advantages>; A is the mean of the sequence's]",
    facts=LossFacts(
        ratio="s, one per sequence, passes a smooth gate and carries the gradient",
        gradient="flows through the mean of the sequence; fades smoothly as s leaves 1",
        source="AReaL's ``sapo`` with ``importance_sampling_level=sequence``; after Gao et al. 2025, arXiv 2511.20347",
    ),
)
def sapo_sequence(
    t: PolicyTerms,
    *,
    tau_pos: Positive = 1.0,
    tau_neg: Positive = 1.05,
    average_advantages: bool = True,
    anchor: Anchor = "old",
) -> Tensor:
    """Fade a sequence out smoothly as the geometric mean of its ratios leaves 1.

    ``loss = -(4 / tau) sigmoid(tau (s - 1)) A`` with ``s = exp(mean over the sequence of log pi_theta - log pi_old)``;
    the gradient flows through the mean.

    Args:
        t: the tensors of the selected tokens, [N].
        tau_pos: temperature where A > 0; 1.0 as in the paper.
        tau_neg: temperature elsewhere; 1.05 as in the paper.
        average_advantages: whether A is the mean of the sequence's (AReaL); without effect where they are equal.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean of 4 g (1 - g), g the sigmoid.
    """
    advantages = t.segment_mean(t.advantages) if average_advantages else t.advantages
    return _gated(t, t.sequence_ratio(anchor), advantages, tau_pos, tau_neg)


def _gated(t: PolicyTerms, ratio: Tensor, advantages: Tensor, tau_pos: float, tau_neg: float) -> Tensor:
    tau = (advantages > 0).to(ratio.dtype) * (tau_pos - tau_neg) + tau_neg
    gate = (tau * (ratio - 1)).sigmoid()
    t.report("gate", 4 * gate * (1 - gate))
    return -4 / tau * gate * advantages
