"""PPO weighted by the future: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, ratios, reports, tokens

FREE = {"weight_range": None, "safety_threshold": None}


def test_the_sum_looks_ahead_in_its_own_sequence() -> None:
    # Half-life 1: half of the next, a quarter of the one after. Sequence 0: log ratios 0, 0.1, 0.1.
    terms = tokens([0, 0.1, 0.1, -0.1], [1, 1, 1, 1], sequences=[0, 0, 0, 1])
    future = [0.05 + 0.025, 0.1 + 0.05, 0.1, -0.1]
    losses = [-math.exp(f + x) for f, x in zip(future, [0, 0.1, 0.1, -0.1], strict=True)]
    check("fipo", terms, losses, losses, half_life=1.0, **FREE)
    # Scored tokens that stand three places apart count 1/8.
    apart = tokens([0, 0.1], [1, 1], positions=[4, 7])
    losses = [-math.exp(0.0125), -math.exp(0.1 + 0.1)]
    check("fipo", apart, losses, losses, half_life=1.0, **FREE)


def test_the_weight_is_bounded() -> None:
    # Future 1 -> e > 1.2; future -1 -> 1/e < 1, kept at 1, or at 0.8 when both sides are open.
    check("fipo", tokens([0, 1.0, 0, -1.0], [1, 0, 1, 0], sequences=[0, 0, 1, 1]), [-1.2, 0, -1, 0], [-1.2, 0, -1, 0])
    terms = tokens([0, -1.0], [1, 0])
    check("fipo", terms, [-0.8, 0], [-0.8, 0], only_raise=False)
    assert reports(terms)["future_weight"] == pytest.approx(0.8)


def test_unsafe_tokens_are_not_amplified() -> None:
    # r = 5 > 4 and A < 0: the weight 1.2 becomes 1; A > 0 keeps it (PPO's 1.2 times 1.2).
    check("fipo", tokens(ratios(5), [-1]), [5], [5])
    check("fipo", tokens(ratios(5), [-1]), [6], [6], safety_threshold=None)
    check("fipo", tokens(ratios(5), [1]), [-1.44], [0])


def test_tokens_above_delta_leave_the_sum() -> None:
    # Without the second token's log 5 the first has weight 1; the second is capped at 3 and, unsafe, has weight 1.
    check("fipo", tokens([0, math.log(5)], [1, -1]), [-1.2, 5], [-1.2, 5])
    check("fipo", tokens([0, math.log(5)], [1, -1]), [-1, 3], [-1, 0], delta=3.0)
