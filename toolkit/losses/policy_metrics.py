"""Metrics of the scored tokens of a policy loss. N: scored tokens of one call."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from toolkit.functional.kl import k3
from toolkit.functional.kl_facts import MAX_K3, MAX_LOG_DIFF
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.kwargs import GRPOLossKwargs
from toolkit.metrics import Mean, Metric, Metrics, Sum, extremes, without_graph


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
            **terms.means(),
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


def all_metrics(
    terms: PolicyTerms,
    losses: Metrics,
    wide: Metrics,
    *,
    kl: Tensor | None,
    entropy: Tensor | None,
    loss_kwargs: GRPOLossKwargs,
) -> Callable[[], dict[str, Metric]]:
    """Return a function that computes all metrics of a policy loss; it keeps no graph.

    Args:
        terms: what the policy loss saw, without graph.
        losses: the loss and its terms.
        wide: metrics over all tokens that the loss or a correction looks at.
        kl: [N] values of the KL term; None: there is none.
        entropy: [N] of the policy; None: not asked for.
        loss_kwargs: of these tokens.
    """
    rollout, current = loss_kwargs.rollout_logprobs, loss_kwargs.current_logprobs
    values = {"kl_ref": kl, "entropy": entropy}
    means = {name: without_graph(each) for name, each in values.items() if each is not None}

    def measured() -> dict[str, Metric]:
        metrics = {**terms.reported, **wide, **policy_metrics(terms, rollout), **losses}
        if current is not None:  # they should be the same
            metrics["current_mismatch"] = Mean.of((terms.logprobs - current).abs())
        return metrics | {name: Mean.of(each) for name, each in means.items()}

    return measured
