"""Whose gradient each estimator follows: every entry of the table by exact enumeration over three tokens (R13)."""

import math

import pytest
import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.kl import kl_estimate
from toolkit.functional.kl_facts import GRADIENT_FACTS, KL_GRADIENTS, KL_NAMES, expected_gradient_facts, kl_warning

POLICY, REFERENCE, SAMPLER = [1.0, 0.0, -1.0], [0.0, 0.5, -0.5], [-0.5, 0.3, 0.8]
KL = 0.270525
REVERSE = [0.33404, -0.24421, -0.08984]
FORWARD = [0.35805, -0.26175, -0.09629]
CORRECTED_K2 = [0.34161, -0.24974, -0.09187]
PAIRS = [(estimator, gradient) for estimator in ("k1", "abs", "k2", "k3") for gradient in KL_GRADIENTS]


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(logit) for logit in logits)
    return [math.exp(logit) / total for logit in logits]


P, Q = softmax(POLICY), softmax(REFERENCE)
TRUE_KL = sum(p * math.log(p / q) for p, q in zip(P, Q, strict=True))
GRADIENTS = {
    # d KL(p || q) / d logit_j = p_j (log p_j / q_j - KL) and d KL(q || p) / d logit_j = p_j - q_j
    "reverse": [p * (math.log(p / q) - TRUE_KL) for p, q in zip(P, Q, strict=True)],
    "forward": [p - q for p, q in zip(P, Q, strict=True)],
    "zero": [0.0, 0.0, 0.0],
}


def expectation(estimator: str, gradient: str, sampler: list[float] = POLICY) -> tuple[float, list[float]]:
    """Value and gradient over the policy's logits, in expectation over tokens drawn from `sampler`."""
    logits = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    drawn = torch.tensor(sampler, dtype=torch.float64).log_softmax(-1)
    ref = torch.tensor(REFERENCE, dtype=torch.float64).log_softmax(-1)
    found = kl_estimate(logprobs, ref, estimator, gradient=gradient, log_ratio=logprobs - drawn)
    total = (drawn.exp() * found).sum()
    total.backward()
    assert logits.grad is not None
    return total.item(), logits.grad.tolist()


def close(left: list[float], right: list[float]) -> bool:
    return left == pytest.approx(right, abs=1e-12)


def far(left: list[float], right: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) > 1e-3


def test_the_closed_forms_are_the_published_numbers() -> None:
    assert pytest.approx(KL, abs=1e-6) == TRUE_KL
    assert GRADIENTS["reverse"] == pytest.approx(REVERSE, abs=1e-5)
    assert GRADIENTS["forward"] == pytest.approx(FORWARD, abs=1e-5)


def test_the_table_has_every_pair() -> None:
    assert set(GRADIENT_FACTS) == set(PAIRS)
    assert {name for name, _ in GRADIENT_FACTS} == set(KL_NAMES.values())


@pytest.mark.parametrize(("estimator", "gradient"), PAIRS)
def test_fact_on_tokens_of_the_policy(estimator: str, gradient: str) -> None:
    fact = expected_gradient_facts(estimator, gradient)
    value, found = expectation(estimator, gradient)
    assert (abs(value - TRUE_KL) < 1e-12) == fact.value_unbiased
    if fact.expected_gradient == "neither":
        assert all(far(found, other) for other in GRADIENTS.values())
        assert fact.note
    else:
        assert close(found, GRADIENTS[fact.expected_gradient])


@pytest.mark.parametrize(("estimator", "gradient"), PAIRS)
def test_fact_on_tokens_of_another_policy(estimator: str, gradient: str) -> None:
    fact = expected_gradient_facts(estimator, gradient)
    value, found = expectation(estimator, gradient, SAMPLER)
    if fact.off_policy:
        on_policy, gradient_on_policy = expectation(estimator, gradient)
        assert value == pytest.approx(on_policy, abs=1e-12)
        assert close(found, gradient_on_policy)
    else:
        assert abs(value - TRUE_KL) > 1e-3
        assert all(far(found, other) for other in GRADIENTS.values())


def test_published_numbers_of_the_biased_ones() -> None:
    assert expectation("k2", "as_is")[0] == pytest.approx(0.287124, abs=1e-6)
    for gradient in ("score_corrected", "is_corrected"):
        assert expectation("k2", gradient)[1] == pytest.approx(CORRECTED_K2, abs=1e-5)


def _own_expectation(values: Tensor) -> list[float]:
    """The gradient of sum p v(d) where p and v both move."""
    (gradient,) = torch.autograd.grad(values.sum(), LOGITS, retain_graph=True)
    return gradient.tolist()


LOGITS = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)


def test_notes_of_the_ones_that_follow_neither() -> None:
    p, q = LOGITS.softmax(-1), torch.tensor(REFERENCE, dtype=torch.float64).softmax(-1)
    difference = p.log() - q.log()
    assert "total variation" in expected_gradient_facts("abs", "as_is").note
    assert close(expectation("abs", "as_is")[1], _own_expectation((p - q).abs()))
    for estimator, values in (("abs", p * difference.abs()), ("k2", p * difference.square() / 2)):
        for gradient in ("score_corrected", "is_corrected"):
            assert "the biased expected value" in expected_gradient_facts(estimator, gradient).note
            assert close(expectation(estimator, gradient)[1], _own_expectation(values))


def test_warning_exactly_where_the_gradient_is_not_the_reverse_kls() -> None:
    for estimator, gradient in PAIRS:
        fact = expected_gradient_facts(estimator, gradient)
        assert (kl_warning(estimator, gradient) is None) == (fact.expected_gradient == "reverse")


def test_warnings_say_what_happens_and_what_to_do() -> None:
    assert kl_warning("kl") == (
        "kl_loss_type='kl' with kl_gradient='as_is' has zero expected gradient on tokens of the current policy: as a "
        "loss it adds noise and does not pull to the reference; kl_gradient='straight_through', 'score_corrected' or "
        "'is_corrected' gives that of the reverse KL"
    )
    forward, neither = kl_warning("low_var_kl"), kl_warning("mse", "is_corrected")
    assert forward is not None
    assert "kl_loss_type='low_var_kl'" in forward
    assert "forward KL" in forward
    assert neither is not None
    assert "neither KL (it is that of the biased expected value); kl_gradient='as_is' or 'straight_through'" in neither


def test_unknown_names_are_named() -> None:
    with pytest.raises(ConfigError, match=r"kl_type='k4' is not a KL estimator; choose 'kl', 'k1'"):
        kl_warning("k4")
    with pytest.raises(ConfigError, match=r"gradient='score' of the KL term is not known; choose 'as_is'"):
        expected_gradient_facts("k1", "score")
