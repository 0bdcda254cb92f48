"""Names of the KL estimators, and which KL their gradients follow in expectation; no torch here.

A KL penalty on sampled tokens has two separate properties: the expectation of its *value*, which is what a curve shows,
and the expectation of its *gradient*, which is what the policy follows. Differentiating an unbiased value does not
give an unbiased gradient, because the tokens were drawn from the policy that is being differentiated:
``grad E_pi[v] = E_pi[grad v + v grad log pi]``, and plain autograd has only the first term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from toolkit.errors import listed
from toolkit.functional.names import KLGradient, check_choice

KL_NAMES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
"""Every accepted name and the estimator it means; ``kl``, ``mse`` and ``low_var_kl`` are XTuner's spellings."""

KL_GRADIENTS = get_args(KLGradient)
"""What flows back through an estimator; see `toolkit.functional.kl.kl_estimate`."""

MAX_LOG_DIFF = 20.0
"""Bound on |d| before exp in k3, in nats (as XTuner and verl); the gradient is 0 outside."""
MAX_K3 = 10.0
"""Bound on the value of k3, in nats (as XTuner and verl); the gradient is 0 above."""

Expected = Literal["reverse", "forward", "zero", "neither"]
"""That of KL(policy || reference), that of KL(reference || policy), zero, or that of neither KL."""


@dataclass(frozen=True, kw_only=True)
class GradientFact:
    """What one estimator with one gradient does in expectation over the sampled tokens, without clamps.

    The expectation is over tokens drawn from the current policy. With ``is_corrected`` it is over tokens drawn from any
    policy that gives every token some probability, provided that the ratio is against that policy and not bounded.
    """

    estimator: str
    """``k1``, ``abs``, ``k2`` or ``k3``."""
    gradient: str
    """A name in `KL_GRADIENTS`."""
    value_unbiased: bool
    """Whether the expected value is KL(policy || reference)."""
    expected_gradient: Expected
    """Which KL the expected gradient belongs to."""
    off_policy: bool
    """Whether both facts also hold on tokens drawn from another policy than the current one."""
    note: str = ""
    """What the expected gradient is when it belongs to neither KL."""


_VARIATION, _BIASED = "twice the total variation distance", "the biased expected value"
_EXPECTED: dict[str, tuple[Expected, Expected, Expected, Expected]] = {
    # in the order of KL_GRADIENTS
    "k1": ("zero", "reverse", "reverse", "reverse"),
    "abs": ("neither", "reverse", "neither", "neither"),
    "k2": ("reverse", "reverse", "neither", "neither"),
    "k3": ("forward", "reverse", "reverse", "reverse"),
}

GRADIENT_FACTS: dict[tuple[str, str], GradientFact] = {
    (estimator, gradient): GradientFact(
        estimator=estimator,
        gradient=gradient,
        value_unbiased=estimator in ("k1", "k3"),
        expected_gradient=expected,
        off_policy=gradient == "is_corrected",
        note="" if expected != "neither" else f"it is that of {_VARIATION if gradient == 'as_is' else _BIASED}",
    )
    for estimator, row in _EXPECTED.items()
    for gradient, expected in zip(KL_GRADIENTS, row, strict=True)
}
"""The fact of every (estimator, gradient); the tests prove each by exact enumeration over a small vocabulary."""


def expected_gradient_facts(kl_type: str, gradient: str = "as_is") -> GradientFact:
    """Return what an estimator (a name in `KL_NAMES`) with a gradient (one in `KL_GRADIENTS`) does in expectation.

    Raises:
        ConfigError: one of the two names is unknown.
    """
    check_choice(kl_type, KL_NAMES, f"kl_type={kl_type!r} is not a KL estimator")
    check_choice(gradient, KL_GRADIENTS, f"gradient={gradient!r} of the KL term is not known")
    return GRADIENT_FACTS[KL_NAMES[kl_type], gradient]


def kl_warning(kl_type: str, gradient: str = "as_is") -> str | None:
    """Return what is wrong with the gradient of `expected_gradient_facts`, None if it is that of the reverse KL."""
    fact = expected_gradient_facts(kl_type, gradient)
    if fact.expected_gradient == "reverse":
        return None
    trouble = {
        "zero": "has zero expected gradient on tokens of the current policy: as a loss it adds noise and does not pull "
        "to the reference",
        "forward": "follows the gradient of the forward KL(reference || policy), not of the reverse KL that its value "
        "estimates",
        "neither": f"follows the gradient of neither KL ({fact.note})",
    }[fact.expected_gradient]
    better = [name for name in KL_GRADIENTS if GRADIENT_FACTS[fact.estimator, name].expected_gradient == "reverse"]
    return (
        f"kl_loss_type={kl_type!r} with kl_gradient={gradient!r} {trouble}; "
        f"kl_gradient={listed(better)} gives that of the reverse KL"
    )
