"""Exact divergences between next-token distributions, without sampling. N: positions, V: vocabulary, K: candidates.

A sampled estimate is unbiased but noisy. These are exact over their tokens, but need the log-probability of every token
(or of K tokens) under both policies.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.errors import ConfigError, did_you_mean, listed

KL_DIRECTIONS: tuple[str, ...] = ("reverse", "forward", "jensen_shannon")
"""KL(policy || reference), KL(reference || policy), or half of each against their even mixture."""
KL_TAILS: tuple[str, ...] = ("drop", "one_bucket")
"""How the probability outside of the candidates is treated."""


def full_kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the exact reverse KL of each position, sum over the vocabulary of p (log p - log q).

    Autograd of it is the true gradient: the sum over tokens includes the score-function term, which sampling omits.

    Args:
        logprobs: [N, V] log-probabilities of the policy in nats, with gradient; -inf for an impossible token,
            which adds exactly 0.
        ref_logprobs: [N, V] those of the reference, finite wherever `logprobs` is.

    Returns:
        [N] in nats, not yet weighted.
    """
    return _divergence(logprobs, ref_logprobs)


def top_k_kl(logprobs: Tensor, ref_logprobs: Tensor, *, direction: str = "reverse", tail: str = "one_bucket") -> Tensor:
    """Return a divergence over K candidate tokens of each position.

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
        direction: "reverse" KL(policy || reference), "forward" KL(reference || policy) or "jensen_shannon"; candidates
            should come from the side whose probabilities weigh the terms: the policy's for "reverse", the reference's
            for "forward".
        tail: "one_bucket" or "drop".

    Returns:
        [N] in nats, not yet weighted.

    Raises:
        ConfigError: an unknown direction or tail.
    """
    for name, value, allowed in (("direction", direction, KL_DIRECTIONS), ("tail", tail, KL_TAILS)):
        if value not in allowed:
            raise ConfigError(
                f"{name}={value!r} of the top-k KL is not known; choose {listed(allowed)}{did_you_mean(value, allowed)}"
            )
    if tail == "one_bucket":
        logprobs, ref_logprobs = _with_tail(logprobs), _with_tail(ref_logprobs)
    if direction == "reverse":
        return _divergence(logprobs, ref_logprobs)
    if direction == "forward":
        return _divergence(ref_logprobs, logprobs)
    # logaddexp has a NaN gradient at (-inf, -inf); both divergences skip such an outcome.
    absent = logprobs.isneginf() & ref_logprobs.isneginf()
    mixture = torch.logaddexp(logprobs.masked_fill(absent, 0.0), ref_logprobs.masked_fill(absent, 0.0)) - math.log(2)
    return 0.5 * (_divergence(logprobs, mixture) + _divergence(ref_logprobs, mixture))


def _divergence(left: Tensor, right: Tensor) -> Tensor:
    """Return the sum over the last axis of p (log p - log q); an outcome with p = 0 adds 0 and has no gradient."""
    impossible = left.isneginf()
    # Filled before the subtraction: -inf - -inf is NaN, and 0 * NaN would bring it back in the backward.
    log_p, log_q = left.masked_fill(impossible, 0.0), right.masked_fill(impossible, 0.0)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _with_tail(logprobs: Tensor) -> Tensor:
    """Append the log of the remaining mass: [N, K] -> [N, K + 1]; at least the resolution of the dtype."""
    smallest = torch.finfo(logprobs.dtype).eps
    inside = logprobs.logsumexp(-1, keepdim=True).clamp(max=-smallest)
    return torch.cat([logprobs, (-inside.expm1()).log()], dim=-1)
