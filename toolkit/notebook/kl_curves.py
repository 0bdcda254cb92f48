"""A KL estimator: its value and gradient at a token, and what both are in expectation. No widgets here.

The expectations are exact: a policy over two tokens, whose logit is its only parameter, is enumerated. P: points.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.kl import Clamp, kl_estimate
from toolkit.functional.kl_facts import KL_NAMES, expected_gradient_facts

ESTIMATORS = tuple(dict.fromkeys(KL_NAMES.values()))
"""k1, abs, k2 and k3, each once."""
MAX_D = 3.0
"""Largest |log pi - log pi_ref| of the curve at a token, in nats."""
NUM_POINTS = 121
EDGE = 0.05
"""Smallest probability of either token."""
CLAMPED = " In a part of the curve the usual clamp of the estimate binds, and there is no gradient from there."
Sampler = Literal["current", "reference"]
"""Which policy drew the tokens: the one that is differentiated, or the reference (an older one)."""


@dataclass(frozen=True, kw_only=True)
class KLCurves:
    """Values in nats; gradients are with respect to log pi at a token, and to the policy's logit in expectation."""

    d: list[float]
    """[P] log pi - log pi_ref of the token."""
    values: list[float]
    """[P] the estimate at a token."""
    slopes: list[float]
    """[P] its gradient at a token."""
    probabilities: list[float]
    """[P] the policy's probability of the first token."""
    expected_values: list[float]
    reverse_values: list[float]
    """[P] KL(policy || reference)."""
    expected_gradients: list[float]
    reverse_gradients: list[float]
    forward_gradients: list[float]
    """[P] the gradient of KL(reference || policy)."""
    words: str
    """What the gradient does in expectation."""


def kl_curves(
    estimator: str, gradient: str = "as_is", *, reference: float = 0.3, sampler: Sampler = "current"
) -> KLCurves:
    """Return the curves of an estimator with a gradient.

    Args:
        estimator: a name in `KL_NAMES`.
        gradient: a name in `kl_facts.KL_GRADIENTS`.
        reference: the reference's probability of the first token, in (0, 1).
        sampler: which policy drew the tokens. The ratio of ``is_corrected`` is to this policy.

    Raises:
        ConfigError: a name is unknown, or `reference` is not a probability between 0 and 1.
    """
    fact = expected_gradient_facts(estimator, gradient)
    if not 0 < reference < 1:
        raise ConfigError(f"reference={reference} must lie between 0 and 1")
    d = torch.linspace(-MAX_D, MAX_D, NUM_POINTS, dtype=torch.float64)
    # At a token the ratio of is_corrected is 1: its policy is the current one.
    values, slopes = _at_tokens(d, torch.zeros_like(d), estimator, gradient, 0 * d)
    first = torch.linspace(EDGE, 1 - EDGE, NUM_POINTS, dtype=torch.float64)
    probabilities = torch.stack([first, 1 - first])
    references = torch.tensor([[reference], [1 - reference]], dtype=torch.float64).expand_as(probabilities)
    drawn_by = probabilities if sampler == "current" else references
    shift = (probabilities / drawn_by).log()
    estimates, token_slopes = _at_tokens(probabilities.log(), references.log(), estimator, gradient, shift)
    unbounded, _ = _at_tokens(probabilities.log(), references.log(), estimator, gradient, shift, clamp=None)
    by_logit = torch.stack([1 - first, -first])  # the derivative of log pi of each token with respect to the logit
    log_ratio = (probabilities / references).log()
    reverse = (probabilities * log_ratio).sum(0)
    return KLCurves(
        d=d.tolist(),
        values=values.tolist(),
        slopes=slopes.tolist(),
        probabilities=first.tolist(),
        expected_values=(drawn_by * estimates).sum(0).tolist(),
        reverse_values=reverse.tolist(),
        expected_gradients=(drawn_by * token_slopes * by_logit).sum(0).tolist(),
        reverse_gradients=(probabilities * by_logit * log_ratio).sum(0).tolist(),
        forward_gradients=(first - reference).tolist(),
        words=_words(fact.value_unbiased, fact.expected_gradient, fact.off_policy, sampler)
        + ("" if torch.equal(unbounded, estimates) else CLAMPED),
    )


def _at_tokens(
    logprobs: Tensor, references: Tensor, estimator: str, gradient: str, log_ratio: Tensor, clamp: Clamp = "auto"
) -> tuple[Tensor, Tensor]:
    """Return the estimate at each token and its derivative with respect to the token's log-probability."""
    leaf = logprobs.clone().requires_grad_()
    anchored = leaf - leaf.detach() + log_ratio
    values = kl_estimate(
        leaf.reshape(-1),
        references.reshape(-1),
        estimator,
        gradient=gradient,
        input_clamp=clamp,
        output_clamp=clamp,
        log_ratio=anchored.reshape(-1) if gradient == "is_corrected" else None,
    )
    (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach().reshape(leaf.shape), slopes


def _words(is_unbiased: bool, expected: str, is_off_policy: bool, sampler: Sampler) -> str:
    follows = {
        "reverse": "that of the reverse KL(policy || reference)",
        "forward": "that of the forward KL(reference || policy)",
        "zero": "zero: it does not pull to the reference",
        "neither": "that of neither KL",
    }[expected]
    where = "on tokens of any policy" if is_off_policy else "on tokens of the current policy"
    caveat = "" if is_off_policy or sampler == "current" else "; these tokens are older, so neither need hold"
    return f"In expectation {where}: value {'unbiased' if is_unbiased else 'biased'}, gradient {follows}{caveat}."
