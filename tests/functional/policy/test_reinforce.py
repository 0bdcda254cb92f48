"""Losses without a clip: numbers worked out by hand."""

import pytest

from tests.functional.policy.made import check, ratios, reports, tokens
from toolkit.functional.policy.registry import policy_loss
from toolkit.functional.policy.reinforce import kimi, reinforce


@pytest.mark.parametrize("name", ["reinforce", "gpg"])
def test_reinforce(name: str) -> None:
    check(name, tokens(ratios(3, 1), [1, -2], logprobs=[-1.0, -3.0]), [1, -6], [-1, 2])
    assert policy_loss(name).function is reinforce


def test_is_reinforce() -> None:
    check("is_reinforce", tokens(ratios(4, 0.5, 9), [-1, 2, 0]), [4, -1, 0], [4, -1, 0])
    check("is_reinforce", tokens(ratios(4), [-1]), [1], [1], anchor="self")


def test_nll() -> None:
    terms = tokens([0, 0, 0], [3, -1, 0], logprobs=[-1.0, -2.0, -3.0])
    check("nll", terms, [1, 0, 0], [-1, 0, 0])
    assert reports(terms) == {"positive_fraction": pytest.approx(1 / 3)}
    check("nll", terms, [1, 2, 3], [-1, -1, -1], only_positive=False)


def test_topr() -> None:
    # A > 0: weight 1 whatever the ratio. A < 0: the ratio, at most 1. log pi = -1.
    terms = tokens(ratios(5, 5, 0.5), [2, -1, -1])
    check("topr", terms, [2, -1, -0.5], [-2, 1, 0.5])
    assert reports(terms) == {"clip_fraction_high": pytest.approx(1 / 3)}
    check("topr", terms, [1, -2, -1], [-1, 2, 1], positive_weight=0.5, negative_weight=2.0)


def test_topr_sequence() -> None:
    # R = 1/2 * 1/2 for the bad sequence; in the good one a token with A < 0 still counts in full.
    terms = tokens(ratios(0.5, 0.5, 0.5, 0.5), [-1, -1, 3, -1], sequences=[0, 0, 1, 1])
    check("topr_sequence", terms, [-0.25, -0.25, 3, -1], [0.25, 0.25, -3, 1])
    check("topr_sequence", tokens(ratios(4, 0.5), [-1, -1]), [-1, -1], [1, 1])
    # With each token's own ratio: 1/2 in the bad sequence, and still in full in the good one.
    check("topr_sequence", terms, [-0.5, -0.5, 3, -1], [0.5, 0.5, -3, 1], token_ratio=True)


@pytest.mark.parametrize("name", ["kimi", "dro"])
def test_kimi(name: str) -> None:
    # -A log pi + tau / 2 x^2 with gradient -A + tau x; x = 2 and tau = 1/2: 1 + 1 and -1 + 1.
    check(name, tokens([2.0, -2.0], [1, 1]), [2, 2], [0, -2], tau=0.5)
    check(name, tokens([2.0], [0]), [0.2], [0.2])
    assert policy_loss(name).function is kimi
