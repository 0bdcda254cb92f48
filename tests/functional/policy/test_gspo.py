"""One ratio for a sequence or a turn: numbers worked out by hand."""

import math

import pytest
import torch

from tests.functional.policy.made import check, ratios, reports, tokens, values_and_grads


def test_gspo_clips_the_geometric_mean() -> None:
    # Ratios 2 and 1/2: s = sqrt(2 * 1/2) = 1. Each token's loss is -s = -1 with d s / d log pi = s / 2 from both.
    check("gspo", tokens(ratios(2, 0.5), [1, 1]), [-1, -1], [-1, -1])
    # Ratios 4 and 1: s = 2, above 1.2: -1.2 and no gradient; A = -1 is not clipped: 2 and 2 * 2 / 2.
    high = tokens(ratios(4, 1), [1, 1])
    check("gspo", high, [-1.2, -1.2], [0, 0], cliprange_high=0.2)
    assert reports(high) == {"clip_fraction_low": 0, "clip_fraction_high": 1}
    check("gspo", tokens(ratios(4, 1), [-1, -1]), [2, 2], [2, 2])
    check("gspo", tokens(ratios(4, 1), [-1, -1]), [1.5, 1.5], [0, 0], clip_ratio_c=1.5)


@pytest.mark.parametrize("name", ["gspo", "gspo_token", "segment_ratio"])
def test_delta_caps_the_ratio_of_a_sequence(name: str) -> None:
    # s = 2: max(min(s, 1.5), clip s) = 1.5 without gradient where A < 0; below the cap, as without one.
    options = {"cliprange_low": 0.2, "cliprange_high": 0.2}
    terms = {-1: tokens(ratios(4, 1), [-1, -1], turn_ids=[0, 0]), 1: tokens(ratios(4, 1), [1, 1], turn_ids=[0, 0])}
    check(name, terms[-1], [1.5, 1.5], [0, 0], delta=1.5, **options)
    check(name, terms[-1], [2, 2], [2, 2], delta=3.0, **options)
    check(name, terms[1], [-1.2, -1.2], [0, 0], delta=1.5, **options)


def test_delta_caps_the_product_of_a_sequence() -> None:
    # R = 4.
    check("rloo_sequence", tokens(ratios(4, 1), [-1, -1]), [3, 3], [0, 0], delta=3.0)


def test_gspo_of_a_known_case() -> None:
    # R14c: log ratios 3, -3, 0.6; s = e^0.2 > 1.2. Each token's own clip gives -(1.2 + e^-3 + 1.2) / 3.
    terms = tokens([3, -3, 0.6], [1, 1, 1])
    check("gspo", terms, [-1.2] * 3, [0] * 3, cliprange_low=0.2, cliprange_high=0.2)
    losses, _ = values_and_grads("vanilla", terms)
    assert losses.mean().item() == pytest.approx(-0.8165957, abs=1e-7)
    # The mean is bounded, not each token: 100 and -100 are ratio 1.
    check("gspo", tokens([100, -100], [1, 1]), [-1, -1], [-1, -1])


def test_sequences_are_apart_and_advantages_may_be_averaged() -> None:
    # Sequence 0: s = 2; sequence 1: s = 1/2. Advantages 1 and 3 of sequence 1 average to 2.
    terms = tokens(ratios(2, 0.25, 1), [-1, 1, 3], sequences=[0, 1, 1])
    # d / d log pi of both tokens of sequence 1: -(1 + 3) * 1/2 * 1/2.
    check("gspo", terms, [2, -0.5, -1.5], [2, -1, -1])
    check("gspo", terms, [2, -1, -1], [2, -1, -1], average_advantages=True)


def test_gspo_token_has_the_same_loss_and_each_tokens_own_gradient() -> None:
    terms = tokens(ratios(2, 0.25, 1), [-1, 1, 3], sequences=[0, 1, 1])
    check("gspo_token", terms, [2, -0.5, -1.5], [2, -0.5, -1.5])
    # A ceiling on log s is one on the gradient too.
    check("gspo_token", tokens([0.5], [-1], log_ratio_range=(None, 0.4)), [math.exp(0.4)], [0])


def test_segment_ratio_takes_turns() -> None:
    # One sequence of two turns: ratios 4, 1 -> u = 2 (clipped at 1.2), and ratio 1.1 alone.
    terms = tokens(ratios(4, 1, 1.1), [1, 1, 1], turn_ids=[0, 0, 1])
    check("segment_ratio", terms, [-1.2, -1.2, -1.1], [0, 0, -1.1])
    check("segment_ratio", tokens(ratios(4, 1), [-1, -1], turn_ids=[0, 0]), [1.4, 1.4], [0, 0], clip_ratio_c=1.4)


def test_luspo_is_gspo_times_the_length() -> None:
    # s = 1 for both: 2 tokens count twice, a single one once.
    terms = tokens(ratios(2, 0.5, 1), [1, 1, 1], sequences=[0, 0, 1])
    check("luspo", terms, [-2, -2, -1], [-2, -2, -1])
    # The mean of the sequences' means is then (2 + 1) / 2: every token of the longer one counts in full.
    losses, _ = values_and_grads("luspo", terms)
    assert (losses * torch.tensor([0.5, 0.5, 1])).sum() / 2 == -1.5


def test_rloo_takes_the_product() -> None:
    # R = 1.1 * 1 * 1 = 1.1, each token's loss -1.1, each with d R / d log pi = 1.1 at both tokens.
    check("rloo_sequence", tokens(ratios(1.1, 1), [1, 1]), [-1.1, -1.1], [-2.2, -2.2])
    # Ratios 1.15 each are inside the range, their product is not.
    check("rloo_sequence", tokens(ratios(1.15, 1.15), [1, 1]), [-1.2, -1.2], [0, 0])
    check("rloo_sequence", tokens(ratios(2, 2), [-1, -1]), [3, 3], [0, 0], clip_ratio_c=3.0)
