"""Bounded ratios as weights without gradient: numbers worked out by hand. log pi is -1 everywhere."""

import math

from tests.functional.policy.made import check, ratios, reports, tokens


def test_cispo() -> None:
    # R14d: log ratio 0.5 above the ceiling 1.2 still has gradient -1.2 A; PPO would have none.
    check("cispo", tokens([0.5], [1]), [1.2], [-1.2])
    # Floor 0.8, inside, ceiling 1.2; loss = -w A log pi = w A.
    terms = tokens(ratios(0.5, 1.1, 3), [-2, 1, 1])
    check("cispo", terms, [-1.6, 1.1, 1.2], [1.6, -1.1, -1.2])
    assert reports(terms) == {"clip_fraction_low": 1 / 3, "clip_fraction_high": 1 / 3, "soft_clip_fraction": 1 / 3}
    # The weight is at its bound whatever the sign of A.
    terms = tokens(ratios(0.5, 1.1, 3, 3), [1, 1, 1, -1])
    check("cispo", terms, [0.8, 1.1, 1.2, -1.2], [-0.8, -1.1, -1.2, 1.2])
    assert reports(terms) == {"clip_fraction_low": 1 / 4, "clip_fraction_high": 1 / 2, "soft_clip_fraction": 1 / 4}


def test_cispo_bounds() -> None:
    terms = tokens(ratios(0.5, 3), [1, 1])
    check("cispo", terms, [0.5, 1.2], [-0.5, -1.2], cliprange_low=None)
    check("cispo", terms, [0.8, 3], [-0.8, -3], cliprange_high=None)
    check("cispo", terms, [0.5, 3], [-0.5, -3], cliprange_low=None, cliprange_high=None)
    # A weight of 5 is 5, not 1 + 5; it takes the place of the default.
    check("cispo", tokens(ratios(9), [1]), [5], [-5], weight_max=5.0)
    check("cispo", terms, [0.6, 1.5], [-0.6, -1.5], weight_min=0.6, weight_max=1.5)


def test_cispo_unified_mask() -> None:
    # Below with A < 0 and above with A > 0 are left out, the other two stay at the bound.
    terms = tokens(ratios(0.5, 0.5, 3, 3), [1, -1, 1, -1])
    check("cispo", terms, [0.8, 0, 0, -1.2], [-0.8, 0, 0, 1.2], use_unified_mask=True)
    assert reports(terms) == {"clip_fraction_low": 0.25, "clip_fraction_high": 0.25, "soft_clip_fraction": 0.25}


def test_cispo_anchors() -> None:
    terms = tokens(ratios(3), [1], rollout_logprobs=[-1 - math.log(1.1)])
    check("cispo", terms, [1.1], [-1.1], anchor="rollout")
    check("cispo", terms, [1], [-1], anchor="self")


def test_tis() -> None:
    terms = tokens(ratios(0.5, 3), [1, -1])
    check("tis", terms, [0.5, -1], [-0.5, 1])
    assert reports(terms) == {"clip_fraction_low": 0, "clip_fraction_high": 0.5}
    check("tis", terms, [0.7, -2], [-0.7, 2], weight_min=0.7, weight_max=2.0)


def test_rollout_is_takes_an_open_interval() -> None:
    # Ratios to the sampler: 1/2 and 3/2 are the bounds and already out, 1.25 is in.
    sampled = [-1 - math.log(r) for r in (0.5, 1.25, 1.5, 4)]
    terms = tokens(ratios(1, 1, 1, 1), [1, 2, -1, 1], rollout_logprobs=sampled)
    check("rollout_is", terms, [0, 2.5, 0, 0], [0, -2.5, 0, 0], cliprange_low=0.5, cliprange_high=0.5)
    assert reports(terms) == {"mask_fraction_low": 0.25, "mask_fraction_high": 0.5}
    check("rollout_is", terms, [1, 2, -1, 1], [-1, -2, 1, -1], anchor="old")
