"""VESPO: REINFORCE with a smooth weight for each sequence."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, NotNegative, Positive
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


LOG_WEIGHT_MIN, LOG_WEIGHT_MAX = log(1e-8), 20.0
"""Bounds of the sequence's log weight, in nats, as in TRL; the second also of each token's log ratio."""


@register_policy_loss(
    "vespo",
    scope="sequence",
    formula="-sg(w^k exp(lambda (1 - w))) A log pi; w = product over the sequence of pi / pi_{anchor}"
    "[<?use_rollout_weight> x [min(pi_old / pi_rollout, {rollout_weight_max}) // pi_old / pi_rollout]]; (k, lambda) = "
    "({k_pos}, {lambda_pos}) where A >= 0, else ({k_neg}, {lambda_neg})",
    facts=LossFacts(
        ratio="w, one for a sequence, shapes a weight without gradient",
        gradient="-phi(w) A grad log pi; phi has its peak near w = 1 and goes to 0 on both sides, never exactly 0",
        bound="each token's log ratio is held in {range} and within +-20, log w between -18.4 and 20; this takes "
        "no gradient from log pi",
        source="VESPO, arXiv 2602.10693",
    ),
)
def vespo(
    t: PolicyTerms,
    *,
    k_pos: NotNegative = 2.0,
    lambda_pos: NotNegative = 3.0,
    k_neg: NotNegative = 3.0,
    lambda_neg: NotNegative = 2.0,
    use_rollout_weight: bool = False,
    rollout_weight_max: Positive | None = 2.0,
    anchor: Anchor = "old",
) -> Tensor:
    """Weight REINFORCE by a smooth function of the sequence's ratio that has its peak near 1.

    ``loss = -sg(phi(w)) A log pi_theta`` with ``phi(w) = w^k exp(lambda (1 - w))``, w the product of the sequence's
    ratios; phi(1) = 1, phi -> 0 on both sides, so nothing has to be clipped.

    Args:
        t: the tensors of the selected tokens, [N].
        k_pos: power of w where A >= 0; 2 as in TRL.
        lambda_pos: rate where A >= 0; 3 as in TRL.
        k_neg: power of w where A < 0; 3 as in TRL.
        lambda_neg: rate where A < 0; 2 as in TRL.
        use_rollout_weight: whether w also has the factors pi_old / pi_rollout of its tokens, as TRL multiplies its
            rollout correction inside; needs rollout_logprobs. Then use no other correction.
        rollout_weight_max: cap of each of these factors; None: no cap.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, not yet weighted. Reports the mean of phi.
    """
    log_weight = t.log_ratio(anchor).detach().clamp(-LOG_WEIGHT_MAX, LOG_WEIGHT_MAX)
    if use_rollout_weight:
        log_rollout = t.old_logprobs - t.require("rollout_logprobs")
        ceiling = LOG_WEIGHT_MAX if rollout_weight_max is None else min(log(rollout_weight_max), LOG_WEIGHT_MAX)
        log_weight = log_weight + log_rollout.clamp(LOG_WEIGHT_MIN, ceiling)
    log_weight = t.segment_sum(log_weight).clamp(LOG_WEIGHT_MIN, LOG_WEIGHT_MAX)
    is_positive = (t.advantages >= 0).to(log_weight.dtype)
    k = is_positive * (k_pos - k_neg) + k_neg
    rate = is_positive * (lambda_pos - lambda_neg) + lambda_neg
    phi = (k * log_weight + rate * (1 - log_weight.exp())).clamp(max=LOG_WEIGHT_MAX).exp()
    t.report("phi", phi)
    return -phi * t.advantages * t.logprobs
