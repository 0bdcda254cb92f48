"""KL estimators: hand-worked numbers, and their expected gradients by exact enumeration (R13)."""

import math

import pytest
import torch

from toolkit.functional.kl import ESTIMATORS, kl_estimate


@pytest.mark.parametrize(
    ("kl_type", "value", "gradient"),
    [
        ("k1", math.log(2), 1.0),
        ("kl", math.log(2), 1.0),
        ("abs", math.log(2), 1.0),
        ("k2", math.log(2) ** 2 / 2, math.log(2)),
        ("mse", math.log(2) ** 2 / 2, math.log(2)),
        ("k3", 0.5 - 1 + math.log(2), 0.5),
        ("low_var_kl", 0.5 - 1 + math.log(2), 0.5),
    ],
)
def test_hand_worked_at_probability_ratio_two(kl_type: str, value: float, gradient: float) -> None:
    logprobs = torch.tensor([math.log(0.5)], dtype=torch.float64, requires_grad=True)
    found = kl_estimate(logprobs, torch.tensor([math.log(0.25)], dtype=torch.float64), kl_type)
    found.sum().backward()
    assert found.item() == pytest.approx(value, rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(gradient, rel=1e-12)


TRUE_GRADIENT = [0.33404, -0.24421, -0.08984]


@pytest.mark.parametrize(
    ("kl_type", "value", "gradient"),
    [
        ("k1", 0.270525, [0.0, 0.0, 0.0]),
        ("k2", 0.287124, TRUE_GRADIENT),
        ("k3", 0.270525, [0.35805, -0.26175, -0.09629]),
    ],
)
def test_expected_value_and_gradient_by_enumeration(kl_type: str, value: float, gradient: list[float]) -> None:
    logits = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64, requires_grad=True)
    logprobs = logits.log_softmax(-1)
    ref = torch.tensor([0.0, 0.5, -0.5], dtype=torch.float64).log_softmax(-1)
    expectation = (logprobs.exp().detach() * kl_estimate(logprobs, ref, kl_type)).sum()
    expectation.backward()
    assert expectation.item() == pytest.approx(value, abs=1e-6)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx(gradient, abs=1e-5)


def test_k3_far_from_the_reference_stays_finite() -> None:
    # R13b: clamping only the value would leave a NaN gradient.
    logprobs = torch.tensor([0.0], requires_grad=True)
    found = kl_estimate(logprobs, torch.tensor([100.0]), "k3")
    found.sum().backward()
    assert found.item() == 10.0
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0


def test_k3_keeps_small_differences_in_fp32() -> None:
    found = kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0 - 2**-12]), "k3")
    assert found.item() == pytest.approx(2**-25, rel=1e-3)  # exp(-d) - 1 + d would round to 0


def test_k3_is_never_negative() -> None:
    logprobs, ref = torch.randn(1000), torch.randn(1000)
    assert (kl_estimate(logprobs, ref, "k3") >= 0).all()


def test_all_names_are_covered() -> None:
    assert set(ESTIMATORS) == {"kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"}
