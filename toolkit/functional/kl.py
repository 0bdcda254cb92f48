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

The other gradients, and what each does in expectation, are in `kl_facts`. `full_kl` and `top_k_kl` need no estimate:
they are exact over their tokens, but need the log-probability of every token (or of K) under both policies.

V: vocabulary, K: candidates.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError
from toolkit.functional.kl_facts import MAX_K3, MAX_LOG_DIFF, expected_gradient_facts
from toolkit.functional.names import MAX_LOG_RATIO, KLDirection, KLRatioLevel, KLTail, check_choice
from toolkit.functional.ratios import bounded
from toolkit.metrics import wide_dtype

MAX_EXPONENT = 60.0
"""Bound on |d| in k3 where the caller sets none: e^60 times the largest ratio, e^20, is finite in fp32 (< e^88)."""
Clamp = float | Literal["auto"] | None
"""A bound in nats, None for no bound, or "auto" for the usual bound of the estimator."""


def k3(d: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d for each `d` [N] in nats; value and gradient keep nearly all digits of fp32.

    expm1(-d) and d cancel for small d (fp32 would give 0 at 1e-8), so they are added in float64, which is off by
    2^-53 / d; mps, which has no float64, is off by 2^-24 / d.
    """
    wide = d.to(wide_dtype(d))
    return ((-wide).expm1() + wide).to(d.dtype)


KL_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "abs": Tensor.abs,
    "k2": lambda d: 0.5 * d.square(),
    "k3": k3,
}
"""Each estimator of d [N], per token [N]."""
_SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "k1": (torch.ones_like, lambda d: 1 + d),
    "abs": (Tensor.sign, lambda d: d.sign() + d.abs()),
    "k2": (lambda d: d, lambda d: d * (1 + d / 2)),
    "k3": (lambda d: -(-d).expm1(), lambda d: d),
}
"""The derivative v'(d) of each estimator, and v'(d) + v(d), written without the parts that cancel."""


def kl_estimate(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl_type: str,
    *,
    gradient: str = "as_is",
    input_clamp: Clamp = "auto",
    output_clamp: Clamp = "auto",
    log_ratio: Tensor | None = None,
    log_ratio_range: tuple[float | None, float | None] = (-MAX_LOG_RATIO, MAX_LOG_RATIO),
    ratio_level: KLRatioLevel = "token",
) -> Tensor:
    """Return the named estimator per token, [N] in nats, with the named gradient.

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
    not come from the value. Where a bound of the ratio binds, the weight has no gradient, but the estimator has.

    Args:
        logprobs: [N] log pi in nats, with gradient, fp32 or wider.
        ref_logprobs: [N] log pi_ref in nats.
        kl_type: a name in `kl_facts.KL_NAMES`.
        gradient: a name in `kl_facts.KL_GRADIENTS`.
        input_clamp: bound on |d| in nats for any estimator, None for none, "auto" for 20 with k3 and none otherwise.
            Without a bound k3 still stops at 60 nats, short of overflow.
        output_clamp: bound on the magnitude of the result in nats, None for none, "auto" for 10 with k3 and none
            otherwise.
        log_ratio: [N] log pi_theta - log pi_anchor in nats, where pi_anchor is the policy whose tokens these are; or
            its mean over a sequence, with gradient. Only ``is_corrected`` reads it.
        log_ratio_range: its bounds in nats before exp, as in `ratios.bounded`.
        ratio_level: "token" if `log_ratio` is that of each token, which follows log pi one to one: the gradient is then
            ratio (v'(d) + v(d)) per token, which is ratio x d for k3, where the product rule would subtract numbers of
            the size of exp(-d). "sequence" if it depends on other tokens, too: the product rule and autograd.

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
    check_choice(ratio_level, get_args(KLRatioLevel), f"ratio_level={ratio_level!r} of the KL term is not known")
    raw = logprobs - ref_logprobs
    difference = raw if bound is None else raw.clamp(-bound, bound)
    value = KL_VALUES[estimator](difference)
    if gradient == "as_is":
        return _limited(value, limit)
    if gradient == "straight_through":
        return _with_slope(_limited(value, limit), difference, difference)
    if gradient == "score_corrected":
        log_ratio, ratio_level = torch.zeros_like(raw), "token"
    elif log_ratio is None:
        raise DataError(
            "gradient='is_corrected' of the KL term needs log_ratio, the log pi_theta - log pi_anchor of each token; "
            "pass it, or choose gradient='score_corrected', which uses the policy itself as the anchor"
        )
    held = bounded(log_ratio, *log_ratio_range)
    weight = held.exp()
    if ratio_level == "sequence":
        weight = torch.where(raw == difference, weight, weight.detach())
        return _limited(weight * value, limit)
    product = weight * value
    limited = _limited(product, limit)
    of_value, of_product = (slope(difference) for slope in _SLOPES[estimator])
    slope = (weight * of_product.where(held == log_ratio, of_value)).where(limited == product, 0.0)
    return _with_slope(limited, slope, difference)


def _with_slope(value: Tensor, slope: Tensor, difference: Tensor) -> Tensor:
    """Return `value` [N] with the gradient `slope` [N] with respect to `difference` [N], 0 where that is clamped."""
    # d - sg(d) is 0 with gradient 1, or without a gradient where the input clamp binds.
    return value.detach() + slope.detach() * (difference - difference.detach())


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


def full_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the exact reverse KL of each position, [N] in nats: the sum over the vocabulary of p (log p - log q).

    Autograd of it is the true gradient: the sum over tokens includes the score-function term, which sampling omits.

    Args:
        logprobs: [N, V] log-probabilities of the policy in nats, with gradient; -inf for an impossible token,
            which adds exactly 0.
        ref_logprobs: [N, V] those of the reference, finite wherever `logprobs` is.
    """
    impossible = logprobs.isneginf()
    # Filled before the subtraction: -inf - -inf is NaN, and 0 * NaN would bring it back in the backward.
    log_p, log_q = logprobs.masked_fill(impossible, 0.0), ref_logprobs.masked_fill(impossible, 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def top_k_kl(logprobs: Tensor, ref_logprobs: Tensor, *, direction: str = "reverse", tail: str = "one_bucket") -> Tensor:
    """Return a divergence over K candidate tokens of each position, [N] in nats.

    The remaining mass, 1 - sum of the candidates, is either

    - ``one_bucket``: one more outcome for both policies. The result is the divergence of the coarser distributions:
      never negative, never above the full one, 0 only if they agree on the candidates, and sensitive to mass leaving
      the candidates;
    - ``drop``: ignored. The result is the candidates' terms of the full divergence: it may be negative, and moving mass
      out of the candidates is enough to lower it.

    Args:
        logprobs: [N, K] log-probabilities of the candidates under the policy, over its full vocabulary (not
            renormalised to the candidates), with gradient; -inf where there is no candidate.
        ref_logprobs: [N, K] those under the reference.
        direction: a `KLDirection`; candidates should come from the side whose probabilities weigh the terms: the
            policy's for "reverse", the reference's for "forward".
        tail: "one_bucket" or "drop".

    Raises:
        ConfigError: an unknown direction or tail.
    """
    check_choice(direction, get_args(KLDirection), f"direction={direction!r} of the top-k KL is not known")
    check_choice(tail, get_args(KLTail), f"tail={tail!r} of the top-k KL is not known")
    if tail == "one_bucket":
        logprobs, ref_logprobs = _with_tail(logprobs), _with_tail(ref_logprobs)
    if direction == "reverse":
        return full_kl(logprobs, ref_logprobs)
    if direction == "forward":
        return full_kl(ref_logprobs, logprobs)
    # logaddexp has a NaN gradient at (-inf, -inf); both divergences skip such an outcome.
    absent = logprobs.isneginf() & ref_logprobs.isneginf()
    mixture = torch.logaddexp(logprobs.masked_fill(absent, 0.0), ref_logprobs.masked_fill(absent, 0.0)) - math.log(2)
    return 0.5 * (full_kl(logprobs, mixture) + full_kl(ref_logprobs, mixture))


def _with_tail(logprobs: Tensor) -> Tensor:
    """Append the log of the remaining mass: [N, K] -> [N, K + 1]; at least the resolution of the dtype."""
    smallest = torch.finfo(logprobs.dtype).eps
    inside = logprobs.logsumexp(-1, keepdim=True).clamp(max=-smallest)
    return torch.cat([logprobs, (-inside.expm1()).log()], dim=-1)
