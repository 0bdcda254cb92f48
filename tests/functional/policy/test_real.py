"""Rewards as labels: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, reports, tokens, values_and_grads

LOG2, LOG3 = math.log(2), math.log(3)


def test_real() -> None:
    # Group 0: a good sequence of two tokens and a bad one of one, all scores 0: log 2 + log 2.
    # d / d score = -1/2 (good), 1/2 (bad); each of 3 tokens carries the loss, a good token has half the score.
    terms = tokens([0, 0, 0], [1, 1, -1], sequences=[0, 0, 1], group_ids=[0, 0, 0])
    check("real", terms, [2 * LOG2] * 3, [-0.75, -0.75, 1.5], tau=1.0)
    # tau divides the score: slopes 1 / tau.
    check("real", terms, [2 * LOG2] * 3, [-1.5, -1.5, 3], tau=0.5)


def test_real_groups_and_scores() -> None:
    # Group 0: scores log 3 (bad) and log 2 (bad), no good: log(1 + 3 + 2). Group 1: good with log 3: log(1 + 1/3).
    terms = tokens([LOG3, LOG2, LOG3], [-1, 0, 5], sequences=[0, 1, 2], group_ids=[0, 0, 1])
    losses = [math.log(6), math.log(6), math.log(4 / 3)]
    # Two tokens carry the loss of group 0: 2 * 3/6 and 2 * 2/6.
    check("real", terms, losses, [1, 2 / 3, -0.25], tau=1.0)
    assert reports(terms) == {"score_margin": pytest.approx((-LOG3 - LOG2 + LOG3) / 3)}


def test_real_of_mixed_groups_only() -> None:
    # Group 0: good with log 2, bad with 0: log(1 + 1) + log(1 + 1/2) = log 3. Group 1: two good ones, left out.
    terms = tokens([LOG2, 0, LOG3, 0], [1, -1, 1, 1], sequences=[0, 1, 2, 3], group_ids=[0, 0, 1, 1])
    # Two tokens carry the loss of group 0: 2 * -(1/2)/(3/2) and 2 * 1/2.
    check("real", terms, [math.log(3), math.log(3), 0, 0], [-2 / 3, 1, 0, 0], tau=1.0, only_mixed=True)


def test_real_does_not_overflow() -> None:
    terms = tokens([20.0, -20.0], [-1, 1], sequences=[0, 1], group_ids=[0, 0])
    losses, grads = values_and_grads("real", terms, tau=0.001)
    assert losses.tolist() == pytest.approx([40_000.0] * 2)
    assert grads.tolist() == pytest.approx([2000.0, -2000.0])  # 1 / tau from each of two tokens
