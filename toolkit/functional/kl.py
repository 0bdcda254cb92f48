"""Estimators of KL(policy || reference) from the log-probabilities of sampled tokens. N: selected tokens.

With d = log pi - log pi_ref on tokens sampled from pi (Schulman, "Approximating KL divergence", 2020):

======  ====================  ===========================================================================
name    value                 gradient used as a loss
======  ====================  ===========================================================================
k1      d                     1 per token: zero in expectation on-policy, so it does not pull to the reference
abs     |d|                   sign(d)
k2      d^2 / 2               d: in expectation the true gradient of the reverse KL
k3      exp(-d) - 1 + d       1 - exp(-d): in expectation the gradient of the *forward* KL
======  ====================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

MAX_LOG_DIFF = 20.0
"""Bound on |d| before exp in k3, in nats (as XTuner and verl); the gradient is 0 outside."""
MAX_K3 = 10.0
"""Bound on the value of k3, in nats (as XTuner and verl); the gradient is 0 above."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d per token, [N]: unbiased value, may be negative, zero expected gradient."""
    return logprobs - ref_logprobs


def absolute(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return |d| per token, [N]."""
    return (logprobs - ref_logprobs).abs()


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return d^2 / 2 per token, [N]: biased value, true gradient in expectation."""
    return 0.5 * (logprobs - ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return exp(-d) - 1 + d per token, [N]: unbiased value, never negative, low variance."""
    difference = (logprobs - ref_logprobs).clamp(-MAX_LOG_DIFF, MAX_LOG_DIFF)
    # expm1 keeps d^2/2 for small d, where exp(-d) - 1 would cancel to 0 in fp32.
    return ((-difference).expm1() + difference).clamp(max=MAX_K3)


ESTIMATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "kl": k1,
    "k1": k1,
    "abs": absolute,
    "mse": k2,
    "k2": k2,
    "low_var_kl": k3,
    "k3": k3,
}
"""Every accepted name; ``kl``, ``mse`` and ``low_var_kl`` are XTuner's spellings."""


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kl_type: str) -> Tensor:
    """Return the named estimator per token.

    Args:
        logprobs: [N] log pi in nats, with gradient.
        ref_logprobs: [N] log pi_ref in nats.
        kl_type: a name in `ESTIMATORS`.

    Returns:
        [N] in nats, not yet weighted.
    """
    return ESTIMATORS[kl_type](logprobs, ref_logprobs)
