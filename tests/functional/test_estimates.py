"""Estimates of an evaluation: numbers worked by hand, then the definition, then what they promise."""

import itertools
import math
import random

import pytest

from toolkit.functional.estimates import mean_estimate, unbiased_pass_at_k, wilson_interval


@pytest.mark.parametrize(
    ("num_samples", "num_passed", "k", "expected"),
    [
        (4, 2, 1, 2 / 4),
        (4, 2, 2, 5 / 6),  # of 6 pairs one has both failures
        (4, 1, 2, 3 / 6),
        (4, 2, 3, 1.0),  # three samples hold one of the two that pass
        (5, 1, 5, 1.0),
        (5, 0, 5, 0.0),
        (10, 3, 5, 1 - (7 * 6 * 5 * 4 * 3) / (10 * 9 * 8 * 7 * 6)),  # 11/12
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(num_samples: int, num_passed: int, k: int, expected: float) -> None:
    assert unbiased_pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("num_passed", range(7))
@pytest.mark.parametrize("k", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_one_that_passes(num_passed: int, k: int) -> None:
    passes = [sample < num_passed for sample in range(6)]
    subsets = list(itertools.combinations(passes, k))
    assert unbiased_pass_at_k(6, num_passed, k) == sum(map(any, subsets)) / len(subsets)


def test_pass_at_k_has_no_bias_and_stays_exact_for_many_samples() -> None:
    # Over all outcomes of 5 samples that pass with 0.3 each, its mean is 1 - 0.7^3.
    mean = math.fsum(
        math.comb(5, passed) * 0.3**passed * 0.7 ** (5 - passed) * unbiased_pass_at_k(5, passed, 3)
        for passed in range(6)
    )
    assert mean == pytest.approx(1 - 0.7**3, rel=1e-14)
    assert unbiased_pass_at_k(10**4, 1, 100) == 0.01  # where C(n, k) is beyond any float
    assert unbiased_pass_at_k(10**4, 10**4 - 99, 100) == 1.0


@pytest.mark.parametrize(("num_samples", "num_passed", "k"), [(4, 2, 5), (4, 2, 0), (4, 5, 1), (4, -1, 1)])
def test_what_is_no_pass_at_k(num_samples: int, num_passed: int, k: int) -> None:
    with pytest.raises(ValueError, match="it needs 1 <= k <= the samples"):
        unbiased_pass_at_k(num_samples, num_passed, k)


@pytest.mark.parametrize(
    ("num_passed", "number", "expected"),
    [
        (8, 10, (0.490, 0.943)),
        (5, 10, (0.237, 0.763)),  # 0.5 -+ 1.96 sqrt(0.025 + 0.009604) / 1.38416
        (0, 10, (0.0, 0.278)),  # z^2 / (n + z^2) = 3.8416 / 13.8416
        (10, 10, (0.722, 1.0)),
        (1, 1, (0.207, 1.0)),
    ],
)
def test_wilson_by_hand(num_passed: int, number: int, expected: tuple[float, float]) -> None:
    low, high = wilson_interval(num_passed, number)
    assert (low, high) == pytest.approx(expected, abs=6e-4)
    assert 0 <= low < high <= 1


@pytest.mark.parametrize(("num_passed", "number"), [(3, 17), (40, 41), (1, 512)])
def test_wilson_is_where_the_score_test_rejects(num_passed: int, number: int) -> None:
    """Its ends are the shares p that lie 1.96 of their standard errors from what was seen."""
    for end in wilson_interval(num_passed, number):
        seen = num_passed / number
        assert abs(seen - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / number), rel=1e-9)


def test_no_trials_have_no_share() -> None:
    with pytest.raises(ValueError, match="0 of 0 trials"):
        wilson_interval(0, 0)
    with pytest.raises(ValueError, match="3 of 2 trials"):
        wilson_interval(3, 2)


def test_a_mean_by_hand() -> None:
    # 0, 0.5, 1: mean 0.5, variance 0.25 with n - 1, standard error 0.5 / sqrt(3) = 0.288675.
    mean = mean_estimate([0.0, 0.5, 1.0])
    assert mean == pytest.approx((0.5, 0.2886751345948129))
    assert mean.interval() == pytest.approx((0.5 - 1.96 * 0.2886751345948129, 0.5 + 1.96 * 0.2886751345948129))
    assert mean.interval(0.0, 1.0) == (0.0, 1.0)
    assert mean_estimate([2.0]) == (2.0, None)
    assert mean_estimate([2.0]).interval() is None
    assert mean_estimate([2.0, 2.0]).interval() is None  # nothing shows how much it varies
    with pytest.raises(ValueError, match="no values"):
        mean_estimate([])


def test_a_mean_does_not_depend_on_the_order() -> None:
    values = [random.Random(0).uniform(-1, 1) * 10**power for power in range(-8, 8)]
    assert len({mean_estimate(order) for order in (tuple(values), tuple(reversed(values)), tuple(sorted(values)))}) == 1
