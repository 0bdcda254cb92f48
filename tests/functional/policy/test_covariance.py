"""Clip-cov and KL-cov: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, ratios, reports, tokens, values_and_grads

# mean A = 0, mean log pi = -2; covariances 2 * 1, -1 * -1, -1 * 0, 0 * 0.
ADVANTAGES, LOGPROBS = [2, -1, -1, 0], [-1.0, -3.0, -2.0, -2.0]


def test_clip_cov() -> None:
    terms = tokens(ratios(1, 1, 1, 1), ADVANTAGES, logprobs=LOGPROBS)
    # Above 0.5: the first two lose their loss. Above 1.5: the first.
    check("clip_cov", terms, [0, 0, 1, 0], [0, 0, 1, 0], clip_cov_ratio=1.0, cov_low=0.5)
    check("clip_cov", terms, [0, 1, 1, 0], [0, 1, 1, 0], clip_cov_ratio=1.0, cov_low=1.5)
    check("clip_cov", terms, [-2, 0, 1, 0], [-2, 0, 1, 0], clip_cov_ratio=1.0, cov_low=0.5, cov_high=1.5)
    # Nothing is eligible above 5.
    check("clip_cov", terms, [-2, 1, 1, 0], [-2, 1, 1, 0], cov_low=5.0, cov_high=9.0)


def test_clip_cov_leaves_clipped_tokens_alone() -> None:
    # The first is clipped (1.2 * 2) and keeps its value; the second alone is eligible.
    terms = tokens(ratios(3, 1, 1, 1), ADVANTAGES, logprobs=LOGPROBS)
    check("clip_cov", terms, [-2.4, 0, 1, 0], [0, 0, 1, 0], clip_cov_ratio=1.0, cov_low=0.5)
    assert reports(terms) == {"clip_fraction_low": 0, "clip_fraction_high": 0.25, "clip_cov_fraction": 0.25}


def test_clip_cov_draws_the_same_with_the_same_seed() -> None:
    count = 400
    terms = tokens([0.0] * count, [1, -1] * (count // 2), logprobs=[-1.0, -3.0] * (count // 2))

    def drawn(**options: object) -> list[int]:
        losses, _ = values_and_grads("clip_cov", terms, cov_low=0.5, **options)
        return (losses == 0).nonzero()[:, 0].tolist()

    first = drawn(clip_cov_ratio=0.05)
    assert len(first) == 20
    assert drawn(clip_cov_ratio=0.05) == first
    assert drawn(clip_cov_ratio=0.05, seed=1) != first
    assert set(first) < set(drawn(clip_cov_ratio=0.1))
    assert len(drawn()) == 1  # 2e-4 of 400 is less than one: one


def test_clip_cov_draws_other_places_for_other_tokens() -> None:
    # With the seed alone every step would hold back the same places; so it would if the seed took the low bits of
    # numbers that have none, as 1 and 1.5 in float64.
    count = 400

    def drawn(size: float) -> list[int]:
        terms = tokens([0.0] * count, [size, -size] * (count // 2), logprobs=[-1.0, -3.0] * (count // 2))
        losses, _ = values_and_grads("clip_cov", terms, clip_cov_ratio=0.05, cov_low=0.5)
        return (losses == 0).nonzero()[:, 0].tolist()

    draws = {tuple(drawn(size)) for size in (1.0, 1.5, 2.0, 3.0)}
    assert {len(places) for places in draws} == {20}
    assert len(draws) == 4


def test_advantages_are_centred_too() -> None:
    # Advantages 1, 2, 9 less 4 are -3, -2, 5; log pi -1, -3, -2 less -2 are 1, -1, 0: covariances -3, 2, 0. Without
    # the mean of A they would be 1, -2, 0, and the first the largest.
    terms = tokens(ratios(2, 2, 2), [1, 2, 9], logprobs=[-1.0, -3.0, -2.0])
    check("kl_cov", terms, [-2, -4 + math.log(2), -18], [-2, -4 + 1, -18])
    check("clip_cov", tokens([0] * 3, [1, 2, 9], logprobs=[-1.0, -3.0, -2.0]), [-1, 0, -9], [-1, 0, -9])


def test_kl_cov() -> None:
    # Half of 4 tokens: the first two. |log 2| = |log 1/2|, slope +1 and -1.
    log = math.log(2)
    terms = tokens(ratios(2, 0.5, 1, 1), ADVANTAGES, logprobs=LOGPROBS)
    losses = [-4 + 0.1 * log, 0.5 + 0.1 * log, 1, 0]
    check("kl_cov", terms, losses, [-4 + 0.1, 0.5 - 0.1, 1, 0], kl_cov_ratio=0.5, kl_coef=0.1)
    assert reports(terms) == {"kl_cov_penalty": pytest.approx(log)}
    check("kl_cov", terms, [-4 + log, 0.5, 1, 0], [-3, 0.5, 1, 0])  # at least one
    check("kl_cov", terms, [-4, 0.5, 1, 0], [-4, 0.5, 1, 0], kl_cov_ratio=0.0)
