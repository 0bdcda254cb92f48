"""Learning from a teacher on tokens that the policy sampled: on-policy distillation and SDAR."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import Anchor, Fraction, Positive, SquareCoef
from toolkit.functional.policy.facts import NO_RATIO, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "opd",
    needs=("teacher_logprobs",),
    formula="-sg(log(pi_teacher / pi)) r[, 0 where p_{anchor} - p > {threshold_low}]"
    "[<?log_ratio_sq_coef>; + {log_ratio_sq_coef} (log r)^2]; "
    "r = p / p_{anchor}",
    facts=LossFacts(
        ratio="r carries the gradient; log(pi_teacher / pi) stands in for the advantage, without gradient",
        gradient="in expectation that of KL(policy || teacher); the items' advantages are not read",
        source='Agarwal et al. 2023, arXiv 2306.13649; Thinking Machines 2025, "On-policy distillation"; the mask '
        "and the square: prime-rl's ``ref_kl``",
    ),
)
def opd(
    t: PolicyTerms,
    *,
    threshold_low: Fraction | None = None,
    log_ratio_sq_coef: SquareCoef = 0.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Distil a teacher on the policy's samples: the advantage is log pi_teacher - log pi.

    To use the items' advantages too, add both in the advantages. Reports the mean of log pi - log pi_teacher, the
    sampled reverse KL, and the fraction of tokens skipped.

    Args:
        threshold_low: tokens whose probability fell by more are skipped; None: skip none; 0.2 in prime-rl.
        log_ratio_sq_coef: 1e-3 in prime-rl.
        anchor: "rollout" in prime-rl and Tinker, "self" for the plain form.
    """
    gain = t.require("teacher_logprobs") - t.logprobs.detach()
    t.report("teacher_kl", -gain)
    losses = -gain * t.ratio(anchor)
    if threshold_low is not None:
        is_masked = t.anchor_logprobs(anchor).exp() - t.logprobs.detach().exp() > threshold_low
        t.report("mask_fraction_low", is_masked)
        losses = losses.where(~is_masked, 0.0)
    return losses if log_ratio_sq_coef == 0 else losses + log_ratio_sq_coef * t.log_ratio(anchor).square()


@register_policy_loss(
    "sdar",
    needs=("teacher_logprobs",),
    formula="sg(sigmoid({gate_beta} d)) d; d = log(pi_teacher / pi)",
    facts=LossFacts(
        ratio=NO_RATIO,
        gradient="raises every token by a gate that closes where the teacher likes it less; A is not read",
        bound="",
        source='SDAR ("self-distilled agentic RL"), as in ms-swift\'s ``compute_sdar_loss``',
    ),
)
def sdar(t: PolicyTerms, *, gate_beta: Positive = 5.0) -> TokenLosses:
    """Follow a teacher only where it is surer of the token than the policy is.

    Reports the mean gate.

    Args:
        gate_beta: steepness of the gate, per nat; 5 as in ms-swift.
    """
    difference = t.require("teacher_logprobs") - t.logprobs
    gate = (gate_beta * difference).sigmoid().detach()
    t.report("gate", gate)
    return gate * difference
