"""Masks on the change of a probability: numbers worked out by hand."""

import math

import pytest

from tests.functional.policy.made import check, reports, tokens

P = [math.log(0.6), math.log(0.3), math.log(0.6), math.log(0.3)]
MOVED = [math.log(2), math.log(0.5), math.log(1.2), math.log(0.75)]
"""From 0.3 to 0.6 (+0.3), from 0.6 to 0.3 (-0.3), from 0.5 to 0.6 (+0.1), from 0.4 to 0.3 (-0.1)."""


def test_dppo_tv() -> None:
    # Threshold 0.2: the first two moved too far, if in the direction of A.
    terms = tokens(MOVED, [1, -1, 1, -1], logprobs=P)
    check("dppo_tv", terms, [0, 0, -1.2, 0.75], [0, 0, -1.2, 0.75])
    assert reports(terms) == {"mask_fraction_low": 0.25, "mask_fraction_high": 0.25}
    check("dppo_tv", tokens(MOVED, [-1, 1, 0, 1], logprobs=P), [2, -0.5, 0, -0.75], [2, -0.5, 0, -0.75])


def test_dppo_forms_and_cap() -> None:
    terms = tokens(MOVED, [-1, 1, 1, -1], logprobs=P)
    # The cap ends the gradient of the ratio, but not that of the score.
    check("dppo_tv", terms, [1.5, -0.5, -1.2, 0.75], [0, -0.5, -1.2, 0.75], clip_ratio_c=1.5)
    values = [1.5 * P[0], -0.5 * P[1], -1.2 * P[2], 0.75 * P[3]]
    check("dppo_tv", terms, values, [1.5, -0.5, -1.2, 0.75], clip_ratio_c=1.5, form="score")


def test_dppo_regulariser_has_no_half() -> None:
    # D19: c (log r)^2 with gradient 2 c log r; masked tokens keep it.
    log = math.log(2)
    check("dppo_tv", tokens([log], [1], logprobs=P[:1]), [0.01 * log**2], [0.02 * log], log_ratio_sq_coef=0.01)


def test_dppo_kl() -> None:
    # 0.3 -> 0.6: 0.3 log(1/2) + 0.7 log(0.7 / 0.4) = 0.183787; 0.5 -> 0.6: 0.5 log(5/6) + 0.5 log(5/4) = 0.020411.
    far = 0.3 * math.log(0.5) + 0.7 * math.log(0.7 / 0.4)
    assert far == pytest.approx(0.183787, abs=1e-6)
    terms = tokens([MOVED[0], MOVED[2]], [1, 1], logprobs=[P[0], P[2]])
    check("dppo_kl", terms, [0, -1.2], [0, -1.2])
    check("dppo_kl", terms, [-2, -1.2], [-2, -1.2], threshold_high=far + 1e-9)
    check("dppo_kl", terms, [0, 0], [0, 0], threshold_high=0.02)
    # The other direction is never masked.
    check("dppo_kl", tokens(MOVED[:1], [-1], logprobs=P[:1]), [2], [2])


def test_dppo_kl_of_a_certain_token() -> None:
    check("dppo_kl", tokens([0.0], [1], logprobs=[0.0]), [-1], [-1])
    check("dppo_kl", tokens([math.log(2)], [1], logprobs=[0.0]), [0], [0])


def test_ipo_masks_whatever_the_sign() -> None:
    terms = tokens(MOVED, [-1, 1, 1, 1], logprobs=P)
    losses = [0, 0, -1.2, -0.75]
    check("ipo", terms, losses, losses, anchor="old", threshold=0.2, log_ratio_sq_coef=0.0)
    assert reports(terms) == {"mask_fraction_low": 0.25, "mask_fraction_high": 0.25}
    # Its ratio is to the sampler: 0.3 -> 0.6 is out, and the regulariser stays.
    log = math.log(2)
    sampled = tokens([0.0], [1], logprobs=P[:1], rollout_logprobs=[math.log(0.3)])
    check("ipo", sampled, [1e-3 * log**2], [2e-3 * log])
