"""Soft gates: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, ratios, reports, tokens, values_and_grads


def test_sapo() -> None:
    # r = 1: sigmoid(0) = 1/2, so -(4 / tau) A / 2, and gradient -4 * 1/4 * A = -A on both sides.
    terms = tokens(ratios(1, 1, 1), [1, -1, 0])
    check("sapo", terms, [-2, 2 / 1.05, 0], [-1, 1, 0])
    assert reports(terms) == {"gate": 1}
    # tau = log 3 and r = 2: sigmoid = 3/4, gate 4 * 3/4 * 1/4 = 3/4, gradient -3/4 * 2.
    tau = math.log(3)
    check("sapo", tokens(ratios(2), [1]), [-3 / tau], [-1.5], tau_pos=tau)
    # Far out the gradient fades instead of ending: sigmoid'(9) * 4 * 10.
    _, grads = values_and_grads("sapo", tokens(ratios(10), [1]))
    assert grads.item() == pytest.approx(-40 * math.exp(-9) / (1 + math.exp(-9)) ** 2)


def test_sapo_sequence() -> None:
    # Ratios 4 and 1: s = 2 for both; tau = log 3: 3/4 of 4 / tau. A averages to 2 and d s / d log pi = s / 2.
    tau = math.log(3)
    terms = tokens(ratios(4, 1), [1, 3])
    check("sapo_sequence", terms, [-6 / tau] * 2, [-3, -3], tau_pos=tau)
    check("sapo_sequence", terms, [-3 / tau, -9 / tau], [-3, -3], tau_pos=tau, average_advantages=False)


def test_gmpo() -> None:
    # A = 1, log ratios 1 and -1, range 0.4: only 1 is cut, to 0.4. exp((0.4 - 1) / 2) = e^-0.3; the cut token is
    # still, the other has half of it from each of the two tokens' losses.
    value = math.exp(-0.3)
    terms = tokens([1, -1], [1, 1])
    check("gmpo", terms, [-value, -value], [0, -value])
    assert reports(terms) == {"clip_fraction_low": 0, "clip_fraction_high": 0.5}
    # A = -1: only -1 is cut, to -0.4. exp((1 - 0.4) / 2).
    value = math.exp(0.3)
    check("gmpo", tokens([1, -1], [-1, -1]), [value, value], [value, 0])
    # A token with A = 0 counts as ratio 1; the mean advantage is 1.
    value = math.exp(0.2)
    check("gmpo", tokens([1, 5], [2, 0]), [-value, -value], [0, 0])


def test_vespo() -> None:
    # w = 2 * 1 = 2. A >= 0: 2^2 exp(3 (1 - 2)); A < 0: 2^3 exp(2 (1 - 2)). Loss -phi A log pi = phi A.
    good, bad = 4 * math.exp(-3), 8 * math.exp(-2)
    terms = tokens(ratios(2, 1), [1, -1])
    check("vespo", terms, [good, -bad], [-good, bad])
    assert reports(terms) == {"phi": pytest.approx((good + bad) / 2)}
    # On-policy phi(1) = 1: REINFORCE.
    check("vespo", tokens([0, 0], [1, -1]), [1, -1], [-1, 1])


def test_vespo_with_the_rollout_inside() -> None:
    # Old over rollout is 3 at one token, capped at 2: w = 1/2 * 2 = 1.
    terms = tokens(ratios(0.5), [1], rollout_logprobs=[-1 + math.log(2) - math.log(3)])
    check("vespo", terms, [1], [-1], use_rollout_weight=True)
    phi = 1.5**2 * math.exp(-1.5)
    check("vespo", terms, [phi], [-phi], use_rollout_weight=True, rollout_weight_max=None)
