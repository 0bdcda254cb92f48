"""KL estimators: hand-worked values and gradients, the order of clamps and weights, far from the reference."""

import math
from typing import Any

import pytest
import torch

from toolkit.errors import ConfigError, DataError
from toolkit.functional.kl import kl_estimate
from toolkit.functional.kl_facts import KL_GRADIENTS

LOG2 = math.log(2)


def value_and_gradient(logprob: float, ref: float, kl_type: str, **options: Any) -> tuple[float, float]:
    """One token in float64; `ratio` is pi_theta / pi_anchor, with gradient."""
    logprobs = torch.tensor([logprob], dtype=torch.float64, requires_grad=True)
    if "ratio" in options:
        options["log_ratio"] = logprobs - logprobs.detach() + math.log(options.pop("ratio"))
    value = kl_estimate(logprobs, torch.tensor([ref], dtype=torch.float64), kl_type, **options)
    value.sum().backward()
    assert logprobs.grad is not None
    return value.item(), logprobs.grad.item()


@pytest.mark.parametrize(
    ("kl_type", "value", "gradient"),
    [
        ("k1", LOG2, 1.0),
        ("kl", LOG2, 1.0),
        ("abs", LOG2, 1.0),
        ("k2", LOG2**2 / 2, LOG2),
        ("mse", LOG2**2 / 2, LOG2),
        ("k3", 0.5 - 1 + LOG2, 0.5),
        ("low_var_kl", 0.5 - 1 + LOG2, 0.5),
    ],
)
def test_hand_worked_at_probability_ratio_two(kl_type: str, value: float, gradient: float) -> None:
    assert value_and_gradient(math.log(0.5), math.log(0.25), kl_type) == pytest.approx((value, gradient), rel=1e-12)
    found = kl_estimate(torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)]), kl_type)
    assert found.item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(
    ("kl_type", "score_corrected"),
    [("k1", 1 + LOG2), ("abs", 1 + LOG2), ("k2", LOG2 + LOG2**2 / 2), ("k3", LOG2)],
)
def test_hand_worked_gradients_beside_the_plain_one(kl_type: str, score_corrected: float) -> None:
    args = (math.log(0.5), math.log(0.25), kl_type)
    plain, _ = value_and_gradient(*args)
    straight = value_and_gradient(*args, gradient="straight_through")
    assert straight == pytest.approx((plain, LOG2), rel=1e-12)  # the gradient of k2 is d
    score = value_and_gradient(*args, gradient="score_corrected")
    assert score == pytest.approx((plain, score_corrected), rel=1e-12)
    # A ratio of 3 multiplies the value, and the gradient by the same product rule.
    tripled = value_and_gradient(*args, gradient="is_corrected", ratio=3.0)
    assert tripled == pytest.approx((3 * plain, 3 * score_corrected), rel=1e-12)


def test_ratio_times_k1_is_k1_with_the_importance_ratio() -> None:
    # r d with r = 3 and d = log 2; the derivative is r d + r.
    found = value_and_gradient(math.log(0.5), math.log(0.25), "k1", gradient="is_corrected", ratio=3.0)
    assert found == pytest.approx((3 * LOG2, 3 * LOG2 + 3), rel=1e-12)


def test_output_clamp_bounds_the_product_with_the_ratio() -> None:
    # k3 at d = -2 is e^2 - 3 = 4.39: below 10 itself, above it times 3.
    assert value_and_gradient(-2.0, 0.0, "k3")[0] == pytest.approx(math.e**2 - 3)
    assert value_and_gradient(-2.0, 0.0, "k3", gradient="is_corrected", ratio=3.0) == (10.0, 0.0)
    # At d = -3 it is e^3 - 4 = 16.09: above 10 itself, below it times 0.1, where the gradient lives: r (v' + v) = r d.
    found = value_and_gradient(-3.0, 0.0, "k3", gradient="is_corrected", ratio=0.1)
    assert found == pytest.approx((0.1 * (math.e**3 - 4), -0.3), rel=1e-12)
    assert value_and_gradient(-3.0, 0.0, "k1", output_clamp=2.0) == (-2.0, 0.0)  # both signs


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("kl_type", ["k1", "abs", "k2", "k3"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_no_gradient_where_the_input_clamp_binds(level: str, sign: int, kl_type: str, gradient: str) -> None:
    options = {"gradient": gradient, "input_clamp": 1.0, "output_clamp": None, "ratio_level": level}
    if gradient == "is_corrected":
        options["ratio"] = 2.0
    beyond, at_bound = (value_and_gradient(sign * distance, 0.0, kl_type, **options) for distance in (1.5, 1.0))
    assert beyond[1] == 0
    assert beyond[0] == pytest.approx(at_bound[0], rel=1e-12)
    inside = value_and_gradient(sign * 0.5, 0.0, kl_type, **options)
    assert inside[1] != 0


def test_straight_through_pulls_where_the_output_clamp_binds() -> None:
    # k3 at d = -4 is e^4 - 5 = 49.6.
    assert value_and_gradient(-4.0, 0.0, "k3", gradient="straight_through") == (10.0, -4.0)
    assert value_and_gradient(-4.0, 0.0, "k3") == (10.0, 0.0)


def test_auto_clamps_k3_alone() -> None:
    for kl_type, value in (("k1", -30.0), ("abs", 30.0), ("k2", 450.0), ("k3", 10.0)):
        assert value_and_gradient(-30.0, 0.0, kl_type)[0] == value
    assert value_and_gradient(30.0, 0.0, "k3", output_clamp=None) == pytest.approx((19.0, 0.0))
    assert value_and_gradient(30.0, 0.0, "k3", input_clamp=None, output_clamp=None) == pytest.approx((29.0, 1.0))


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("output_clamp", [None, 10.0])
def test_k3_without_an_input_clamp_stays_finite_in_fp32(gradient: str, output_clamp: float | None) -> None:
    logprobs = torch.tensor([-200.0, -59.0], requires_grad=True)
    log_ratio = logprobs - logprobs.detach() + 20  # the largest that comes from a bounded ratio
    found = kl_estimate(
        logprobs,
        torch.zeros(2),
        "k3",
        gradient=gradient,
        input_clamp=None,
        output_clamp=output_clamp,
        log_ratio=log_ratio,
    )
    found.sum().backward()
    assert found.isfinite().all()
    assert logprobs.grad is not None
    assert logprobs.grad.isfinite().all()
    assert logprobs.grad[0] == 0


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


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("kl_type", ["k1", "abs", "k2", "k3"])
def test_values_and_gradients_have_six_digits_in_fp32(kl_type: str, gradient: str) -> None:
    # Near d = -1 (k1, abs) and -2 (k2) the corrected gradient crosses 0, where the product rule would cancel.
    sizes = 10 ** torch.linspace(-8, math.log10(25), 2001)
    d = torch.cat([sizes, -sizes, -1 + sizes[:1000], -2 + sizes[:1000]]).requires_grad_()
    found = kl_estimate(
        d,
        torch.zeros_like(d),
        kl_type,
        gradient=gradient,
        input_clamp=None,
        output_clamp=None,
        log_ratio=torch.full_like(d, LOG2) if gradient == "is_corrected" else None,
    )
    found.sum().backward()
    x = d.detach().double()
    # exp(-d) - 1 + d in float64 is off by 2^-53 / d, and by its series by less than d^5 / 360.
    k3 = (x.square() / 2 * (1 - x / 3 + x.square() / 12 - x**3 / 60)).where(x.abs() < 1e-3, (-x).expm1() + x)
    value, slope = {
        "k1": (x, torch.ones_like(x)),
        "abs": (x.abs(), x.sign()),
        "k2": (x.square() / 2, x),
        "k3": (k3, -(-x).expm1()),
    }[kl_type]
    corrected = {"k1": 1 + x, "abs": x.sign() + x.abs(), "k2": x * (2 + x) / 2, "k3": x}[kl_type]
    factor = float(torch.tensor(LOG2).exp()) if gradient == "is_corrected" else 1.0
    expected = {"as_is": slope, "straight_through": x}.get(gradient, factor * corrected)
    assert d.grad is not None
    torch.testing.assert_close(found.detach().double(), factor * value, rtol=1e-6, atol=0)
    torch.testing.assert_close(d.grad.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gradient", ["score_corrected", "is_corrected"])
@pytest.mark.parametrize("d", [-25.0, -20.0])
def test_far_below_the_reference_the_corrected_gradient_of_k3_is_d(d: float, gradient: str) -> None:
    logprobs = torch.tensor([d], requires_grad=True)
    found = kl_estimate(
        logprobs,
        torch.zeros(1),
        "k3",
        gradient=gradient,
        input_clamp=None,
        output_clamp=None,
        log_ratio=logprobs - logprobs.detach(),
    )
    found.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == d


def test_a_bounded_ratio_has_no_gradient_but_the_estimator_has() -> None:
    # d = log 2, a ratio of 3 held at 2: the value 2 k3 and the gradient 2 (1 - 1/2).
    found = value_and_gradient(
        math.log(0.5), math.log(0.25), "k3", gradient="is_corrected", ratio=3.0, log_ratio_range=(None, LOG2)
    )
    assert found == pytest.approx((2 * (LOG2 - 0.5), 1.0), rel=1e-12)


def test_the_ratio_of_a_sequence_follows_the_product_rule() -> None:
    # Two tokens with d = log 2 and -log 2, ratios 4 and 1: s = 2 has d s / d l = s / 2 from each of them.
    logprobs = torch.tensor([LOG2, -LOG2], dtype=torch.float64, requires_grad=True)
    log_ratio = logprobs - logprobs.detach() + torch.tensor([2 * LOG2, 0.0], dtype=torch.float64)
    found = kl_estimate(
        logprobs,
        torch.zeros(2, dtype=torch.float64),
        "k3",
        gradient="is_corrected",
        log_ratio=log_ratio.mean().expand(2),
        ratio_level="sequence",
    )
    found.sum().backward()
    values = (LOG2 - 0.5, 1 - LOG2)
    assert found.tolist() == pytest.approx([2 * value for value in values], rel=1e-12)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([2 * 0.5 + sum(values), 2 * (1 - 2) + sum(values)], rel=1e-12)


def test_k3_is_never_negative() -> None:
    logprobs, ref = torch.randn(1000), torch.randn(1000)
    assert (kl_estimate(logprobs, ref, "k3") >= 0).all()


@pytest.mark.parametrize("gradient", KL_GRADIENTS)
@pytest.mark.parametrize("kl_type", ["k1", "abs", "k2", "k3"])
def test_inputs_are_unchanged_and_no_tokens_give_zero(kl_type: str, gradient: str) -> None:
    logprobs, ref = torch.randn(5), torch.randn(5)
    before = logprobs.clone(), ref.clone()
    kl_estimate(logprobs, ref, kl_type, gradient=gradient, log_ratio=torch.zeros(5))
    assert torch.equal(logprobs, before[0])
    assert torch.equal(ref, before[1])
    empty = torch.zeros(0, requires_grad=True)
    found = kl_estimate(empty, empty.detach(), kl_type, gradient=gradient, log_ratio=empty)
    found.sum().backward()
    assert found.sum() == 0
    assert empty.grad is not None


def test_mistakes_are_named() -> None:
    one = torch.zeros(1)
    with pytest.raises(ConfigError, match=r"kl_type='low_var' is not a KL estimator; .*did you mean 'low_var_kl'"):
        kl_estimate(one, one, "low_var")
    with pytest.raises(ConfigError, match=r"gradient='asis' .*'straight_through'.*did you mean 'as_is'"):
        kl_estimate(one, one, "k3", gradient="asis")
    with pytest.raises(DataError, match=r"'is_corrected' .* needs log_ratio"):
        kl_estimate(one, one, "k3", gradient="is_corrected")
    with pytest.raises(ConfigError, match=r"ratio_level='turn' .*'token' or 'sequence'"):
        kl_estimate(one, one, "k3", ratio_level="turn")
    for clamp in (0.0, -1.0, float("nan"), "automatic"):
        with pytest.raises(ConfigError, match=r"input_clamp=.* must be a positive number of nats, None or 'auto'"):
            kl_estimate(one, one, "k3", input_clamp=clamp)
