"""PPO clip and dual clip against numbers worked out by hand, and against a loop written from the papers."""

import math
import random

import pytest
import torch

from tests.functional.policy.made import check, ratios, reports, tokens
from toolkit.errors import DataError
from toolkit.functional.policy.clipped import clipped_surrogate, vanilla
from toolkit.functional.terms import PolicyTerms


def terms(ratio: float, advantage: float, dtype: torch.dtype = torch.float64) -> PolicyTerms:
    logprobs = torch.tensor([math.log(ratio)], dtype=dtype, requires_grad=True)
    old = torch.zeros(1, dtype=dtype)
    return PolicyTerms(logprobs=logprobs, old_logprobs=old, advantages=torch.tensor([advantage], dtype=dtype))


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 1.0, -1.0, -1.0),  # on-policy: REINFORCE
        (1.1, 1.0, -1.1, -1.1),  # inside the range: -A r, gradient -A r
        (1.5, 1.0, -1.2, 0.0),  # above it with A > 0: -A (1 + 0.2), no gradient
        (0.5, 1.0, -0.5, -0.5),  # below it with A > 0: not clipped
        (0.5, -1.0, 0.8, 0.0),  # below it with A < 0: A (1 - 0.2), no gradient
        (1.5, -1.0, 1.5, 1.5),  # above it with A < 0: not clipped ...
        (4.0, -1.0, 3.0, 0.0),  # ... up to the dual clip c = 3
        (4.0, -2.0, 6.0, 0.0),
        (1.0, 0.0, 0.0, 0.0),
    ],
)
def test_hand_worked(ratio: float, advantage: float, loss: float, gradient: float) -> None:
    t = terms(ratio, advantage)
    token_losses = vanilla(t)
    token_losses.sum().backward()
    assert token_losses.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert t.logprobs.grad is not None
    assert t.logprobs.grad.item() == pytest.approx(gradient, rel=1e-12, abs=1e-12)


def test_asymmetric_range() -> None:
    assert vanilla(terms(1.5, 1.0), cliprange_high=0.28).item() == pytest.approx(-1.28)
    assert vanilla(terms(0.5, -1.0), cliprange_low=0.1).item() == pytest.approx(0.9)


def test_dual_clip_only_for_negative_advantages() -> None:
    # R14b: applied to A > 0 it would give -3.0.
    assert vanilla(terms(1.1, 1.0), clip_ratio_c=3.0).item() == pytest.approx(-1.1)
    assert vanilla(terms(4.0, -1.0), clip_ratio_c=None).item() == pytest.approx(4.0)


def test_delta_caps_the_ratio_that_is_not_clipped() -> None:
    # A < 0: min(5, 4) = 4, no gradient, the same as a dual clip of 4; A > 0: without effect above the range.
    for options in ({"delta": 4.0, "clip_ratio_c": None}, {"clip_ratio_c": 4.0}):
        check("vanilla", tokens(ratios(5, 3, 5), [-1, -1, 1]), [4, 3, -1.2], [0, 3, 0], **options)
    capped = tokens(ratios(5, 3), [-1, -1])
    check("vanilla", capped, [4, 3], [0, 3], delta=4.0, clip_ratio_c=None)
    assert reports(capped)["delta_clip_fraction"] == 0.5
    # Below the ceiling of the range it would cap A > 0 as well: max(-1.1, -1.2) and no gradient.
    check("vanilla", tokens(ratios(2), [1]), [-1.1], [0], delta=1.1, clip_ratio_c=None)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (0.75, -1.0, 0.75, 1.0),  # exactly on the floor of 1 - 0.25
        (1.25, 1.0, -1.25, -1.0),  # exactly on the ceiling of 1 + 0.25
        (3.0, -2.0, 6.0, 2.0),  # exactly on the dual clip
        (math.nan, 1.0, math.nan, 0.0),
        (math.inf, 1.0, -1.25, 0.0),
    ],
)
def test_a_ratio_on_a_bound_has_a_gradient_and_nan_has_none(
    ratio: float, advantage: float, loss: float, gradient: float
) -> None:
    given = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    losses = clipped_surrogate(terms(1.0, advantage), given, given.new_tensor([advantage]), 0.25, 0.25, 3.0)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([loss], nan_ok=True)
    assert given.grad is not None
    assert given.grad.item() == gradient


def test_anchors() -> None:
    both = tokens(ratios(1.5), [1], rollout_logprobs=[-1 - math.log(1.1)])
    check("vanilla", both, [-1.2], [0])
    check("vanilla", both, [-1.1], [-1.1], anchor="rollout")
    check("vanilla", both, [-1], [-1], anchor="self")
    with pytest.raises(DataError, match="needs rollout_logprobs"):
        check("vanilla", tokens(ratios(1.5), [1]), [-1.2], [0], anchor="rollout")


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("clip_ratio_c", [3.0, None])
def test_exploded_ratio_has_finite_loss_and_no_gradient(advantage: float, clip_ratio_c: float | None) -> None:
    # R14: log ratio 100; without the bound A > 0 gives a NaN gradient and A < 0 inf.
    logprobs = torch.tensor([100.0], requires_grad=True)
    t = PolicyTerms(logprobs=logprobs, old_logprobs=torch.zeros(1), advantages=torch.tensor([advantage]))
    loss = vanilla(t, clip_ratio_c=clip_ratio_c)
    loss.sum().backward()
    expected = -1.2 if advantage > 0 else (3.0 if clip_ratio_c else math.exp(20.0))
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    assert logprobs.grad is not None
    assert logprobs.grad.item() == 0.0


def reference(new: float, old: float, advantage: float, low: float, high: float, c: float | None) -> float:
    """Eq. 7 of PPO and eq. 5 of dual clip, one token at a time."""
    ratio = math.exp(max(-20.0, min(20.0, new - old)))
    objective = min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)
    if c is not None and advantage < 0:
        objective = max(objective, c * advantage)
    return -objective


def test_against_a_loop_from_the_papers() -> None:
    draw = random.Random(0)
    for _ in range(300):
        new, old, advantage = draw.gauss(-2, 3), draw.gauss(-2, 3), draw.gauss(0, 2)
        low, high, c = draw.random(), draw.random() * 2, draw.choice([None, 1.5, 3.0])
        t = PolicyTerms(
            logprobs=torch.tensor([new], dtype=torch.float64),
            old_logprobs=torch.tensor([old], dtype=torch.float64),
            advantages=torch.tensor([advantage], dtype=torch.float64),
        )
        ours = vanilla(t, cliprange_low=low, cliprange_high=high, clip_ratio_c=c).item()
        assert ours == pytest.approx(reference(new, old, advantage, low, high, c), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(
    ("ratio", "advantage", "low", "high", "dual"),
    [(1.5, 1.0, 0, 1, 0), (1.5, -1.0, 0, 0, 0), (0.5, -1.0, 1, 0, 0), (0.5, 1.0, 0, 0, 0), (4.0, -1.0, 0, 0, 1)],
)
def test_clip_fractions_count_only_where_the_bound_binds(
    ratio: float, advantage: float, low: int, high: int, dual: int
) -> None:
    # R23: a ratio of 1.5 with A < 0 is not clipped above.
    t = terms(ratio, advantage)
    vanilla(t)
    found = {name: metric.value() for name, metric in t.reports().items()}
    assert found == {"clip_fraction_low": low, "clip_fraction_high": high, "dual_clip_fraction": dual}
