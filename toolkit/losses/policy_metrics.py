"""Metrics of the scored tokens of a policy loss. N: scored tokens of one call."""

from __future__ import annotations

from torch import Tensor

from toolkit.functional.kl import k3
from toolkit.functional.kl_facts import MAX_K3, MAX_LOG_DIFF
from toolkit.functional.terms import PolicyTerms
from toolkit.metrics import Mean, Metric, Sum, extremes, without_graph


def policy_metrics(terms: PolicyTerms, rollout_logprobs: Tensor | None) -> dict[str, Metric]:
    """Return ratio statistics between the policy now and before the step, and against the sampler if it reported.

    `rollout_logprobs` [N] are as the sampler gave them, NaN or infinite where it did not report a token.
    """
    logprobs = without_graph(terms.logprobs)
    difference = terms.reported_difference()
    log_ratio, back = terms.bounded(difference), -difference
    ratio = log_ratio.exp()
    zero = logprobs - logprobs  # NaN, which is not equal to itself, where one is NaN or infinite
    means = Mean.of_each(
        {
            **terms.reported_means,
            "ratio": ratio,
            "log_ratio_clamped": difference != log_ratio,
            "kl_old": k3(back.clamp(-MAX_LOG_DIFF, MAX_LOG_DIFF)).clamp(max=MAX_K3),  # as `kl_estimate` bounds it
            "kl_old_k1": back,
            "log_ratio_abs": difference.abs(),
            "non_finite_tokens": zero != zero,
        }
    )
    lowest, highest = extremes(ratio)
    metrics: dict[str, Metric] = {
        **means,
        "ratio_min": lowest,
        "ratio_max": highest,
        "active_tokens": Sum(means["ratio"].den),
        "non_finite_tokens": Sum(means["non_finite_tokens"].num),
    }
    if rollout_logprobs is not None:
        known = rollout_logprobs.isfinite()
        metrics["rollout_missing"] = Mean.of(~known)
        metrics["rollout_mismatch"] = Mean.of((terms.old_logprobs - rollout_logprobs)[known].abs())
    return metrics
