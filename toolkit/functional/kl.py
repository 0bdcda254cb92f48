"""Estimators of KL(policy || reference) from sampled tokens, and where their gradient flows. N: selected tokens.

With d = log pi - log pi_ref on tokens sampled from pi (Schulman, "Approximating KL divergence", 2020):

======  ====================  ===========================================================================
name    value                 gradient used as a loss (``as_is``)
======  ====================  ===========================================================================
k1      d                     1 per token: zero in expectation on-policy, so it does not pull to the reference
abs     |d|                   sign(d): in expectation that of twice the total variation
k2      d^2 / 2               d: in expectation the true gradient of the reverse KL
k3      exp(-d) - 1 + d       1 - exp(-d): in expectation the gradient of the *forward* KL
======  ====================  ===========================================================================

The other gradients, and what each does in expectation, are in `kl_facts`; the KL over a full distribution, which needs
no estimate, is in `kl_exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.functional.kl_exact import full_kl, top_k_kl
from toolkit.functional.kl_facts import (
    KL_GRADIENTS,
    KL_NAMES,
    MAX_K3,
    MAX_LOG_DIFF,
    GradientFact,
    expected_gradient_facts,
    kl_warning,
)
from toolkit.functional.segments import segment_sum

__all__ = [
    "ESTIMATORS",
    "KL_GRADIENTS",
    "MAX_K3",
    "MAX_LOG_DIFF",
    "Clamp",
    "GradientFact",
    "expected_gradient_facts",
    "full_kl",
    "k1",
    "k3",
    "kl_estimate",
    "kl_warning",
    "sequence_kl",
    "top_k_kl",
]

MAX_EXPONENT = 60.0
"""Bound on |d| in k3 where the caller sets none: e^60 times the largest ratio, e^20, is finite in fp32 (< e^88)."""

Clamp = float | Literal["auto"] | None
"""A bound in nats, None for no bound, or "auto" for the usual bound of the estimator."""


def _k1(difference: Tensor) -> Tensor:
    return difference


def _k2(difference: Tensor) -> Tensor:
    return 0.5 * difference.square()


def _k3(difference: Tensor) -> Tensor:
    # expm1 keeps d^2/2 for small d, where exp(-d) - 1 would cancel to 0 in fp32.
    return (-difference).expm1() + difference


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {"k1": _k1, "abs": Tensor.abs, "k2": _k2, "k3": _k3}


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl_type: str,
    *,
    gradient: str = "as_is",
    input_clamp: Clamp = "auto",
    output_clamp: Clamp = "auto",
    log_ratio: Tensor | None = None,
) -> Tensor:
    """Return the named estimator per token, with the named gradient.

    With v(d) the estimator, l = log pi_theta and sg the stop-gradient, the result per token is

    - ``as_is``: v(d), differentiated by autograd as it is;
    - ``straight_through``: the value v(d) with the gradient of k2, which is d;
    - ``score_corrected``: v(d) exp(l - sg(l)): the same value, plus the score-function term v(d) grad l. For tokens
      of the current policy;
    - ``is_corrected``: v(d) exp(log_ratio): the estimator reweighted to the current policy, with the same extra term.
      For tokens of an older policy. With k1 it is the "ratio times k1" of open-instruct, with k3 the unbiased estimate
      of DeepSeek-V3.2.

    `kl_facts.expected_gradient_facts` says which KL each gradient follows in expectation; none is right for all.

    The order is: clamp d, compute the estimator, multiply by the weight, clamp the *product*. So `output_clamp` bounds
    what enters the loss, whatever the ratio is. Where the input clamp binds, the gradient is exactly 0, including that
    of the weight; where the output clamp binds, it is also 0, except under ``straight_through``, whose gradient does
    not come from the value.

    Args:
        logprobs: [N] log pi in nats, with gradient, fp32 or wider.
        ref_logprobs: [N] log pi_ref in nats.
        kl_type: a name in `ESTIMATORS`.
        gradient: a name in `KL_GRADIENTS`.
        input_clamp: bound on |d| in nats for any estimator, None for none, "auto" for 20 with k3 and none otherwise.
            Without a bound k3 still stops at 60 nats, short of overflow.
        output_clamp: bound on the magnitude of the result in nats, None for none, "auto" for 10 with k3 and none
            otherwise.
        log_ratio: [N] log pi_theta - log pi_anchor in nats, with gradient and already bounded, where pi_anchor is the
            policy whose tokens these are; a sequence's ratio repeated per token also works. Only ``is_corrected``
            reads it.

    Returns:
        [N] in nats, not yet weighted.

    Raises:
        ConfigError: an unknown name, or a clamp that is not positive.
        DataError: ``is_corrected`` without `log_ratio`.

    Source: Schulman 2020 for the estimators; DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv 2512.02556), "Unbiased KL
    Estimate", for ``is_corrected``. Differs from it in the clamps, which have no gradient where they bind.
    """
    estimator = expected_gradient_facts(kl_type, gradient).estimator
    bound = _resolved("input_clamp", input_clamp, MAX_LOG_DIFF if estimator == "k3" else None)
    limit = _resolved("output_clamp", output_clamp, MAX_K3 if estimator == "k3" else None)
    if bound is None and estimator == "k3":
        bound = MAX_EXPONENT
    raw = logprobs - ref_logprobs
    difference = raw if bound is None else raw.clamp(-bound, bound)
    value = _VALUES[estimator](difference)
    if gradient == "straight_through":
        # d - sg(d) is 0 with gradient 1, or without a gradient where the input clamp binds.
        value = _limited(value, limit).detach()
        return value + difference.detach() * (difference - difference.detach())
    if gradient == "as_is":
        return _limited(value, limit)
    weight = (logprobs - logprobs.detach() if gradient == "score_corrected" else _require(log_ratio)).exp()
    if bound is not None:
        weight = torch.where(raw == difference, weight, weight.detach())
    return _limited(weight * value, limit)


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d per token, [N]: unbiased value, may be negative. A metric: its expected gradient is zero.

    `logprobs` and `ref_logprobs` are [N], in nats.
    """
    return kl_estimate(logprobs, ref_logprobs, "k1")


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d per token with its usual clamps, [N]: unbiased value, never negative, low variance.

    `logprobs` and `ref_logprobs` are [N], in nats.
    """
    return kl_estimate(logprobs, ref_logprobs, "k3")


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    name: partial(kl_estimate, kl_type=name) for name in KL_NAMES
}
"""Every accepted name and its estimator of (logprobs, ref_logprobs), with the usual clamps, its gradient as it is."""


def sequence_kl(kl_tokens: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    """Sum an estimator over each sequence, without gradient: the KL penalty of a reward.

    The penalised reward of sequence i is ``reward_i - kl_coef * KL_i``. A penalty in the reward needs the *value* to
    be right (k1 or k3): the policy gradient supplies the score-function term. Take k1 when in doubt: the clamps of k3
    bias it where the policies are far apart.

    Args:
        kl_tokens: [N] estimator of each token, in nats.
        ids: [N] int64, the sequence of each token, 0 .. num_sequences - 1.
        num_sequences: S.

    Returns:
        [S] in nats, 0 for a sequence without a token.

    Source: Ziegler et al. 2019, arXiv 1909.08593, eq. 2, where the estimator is k1.
    """
    return segment_sum(kl_tokens.detach(), ids, num_sequences)


def _resolved(name: str, clamp: Clamp, usual: float | None) -> float | None:
    if clamp == "auto":
        return usual
    if clamp is None:
        return None
    if isinstance(clamp, str) or not clamp > 0:
        raise ConfigError(f"{name}={clamp!r} of the KL term must be a positive number of nats, None or 'auto'")
    return clamp


def _limited(value: Tensor, limit: float | None) -> Tensor:
    return value if limit is None else value.clamp(-limit, limit)


def _require(log_ratio: Tensor | None) -> Tensor:
    if log_ratio is None:
        raise DataError(
            "gradient='is_corrected' of the KL term needs log_ratio, the bounded log pi_theta - log pi_anchor of each "
            "token; pass it, or choose gradient='score_corrected', which uses the policy itself as the anchor"
        )
    return log_ratio
