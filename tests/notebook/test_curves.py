"""Curves of losses and KL estimators, weights of aggregations: numbers worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from toolkit import register_policy_loss
from toolkit.errors import ConfigError
from toolkit.functional.kl_facts import KL_GRADIENTS
from toolkit.functional.policy.registry import POLICY_LOSSES, policy_loss, policy_loss_names
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.notebook.kl_curves import ESTIMATORS, kl_curves
from toolkit.notebook.ratio_curves import RatioCurves, Situation, band_words, ratio_curves
from toolkit.notebook.weight_bars import completions_of, token_weights


def curves(name: str, situation: Situation | None = None, **options: object) -> RatioCurves:
    loss = policy_loss(name)
    return ratio_curves(loss, loss.options(options), situation)


def at(result: RatioCurves, ratio: float) -> int:
    return min(range(len(result.ratios)), key=lambda index: abs(result.ratios[index] - ratio))


def test_ppo_by_hand() -> None:
    result = curves("vanilla")
    one = at(result, 1.0)
    assert result.ratios[one] == pytest.approx(1)
    assert (result.positive.losses[one], result.positive.gradients[one]) == pytest.approx((-1, -1))
    assert (result.negative.losses[one], result.negative.gradients[one]) == pytest.approx((1, 1))
    high = at(result, 5.0)
    assert (result.positive.losses[high], result.positive.gradients[high]) == pytest.approx((-1.2, 0))  # clipped
    assert (result.negative.losses[high], result.negative.gradients[high]) == pytest.approx((3, 0))  # dual clip
    two = at(result, 2.0)
    assert result.negative.losses[two] == pytest.approx(result.ratios[two])
    low = at(result, 0.5)
    assert result.positive.gradients[low] == pytest.approx(-result.ratios[low])  # it may go up again
    assert (result.negative.losses[low], result.negative.gradients[low]) == pytest.approx((0.8, 0))


def test_where_the_gradient_vanishes() -> None:
    result = curves("vanilla", cliprange_high=0.28)
    (clip,) = result.positive.bands
    assert (clip.low, clip.high) == pytest.approx((1.28, 10), rel=1e-4)
    assert clip.is_strong
    assert clip.label == "no gradient (metric clip_fraction_high)"
    assert [(band.low, band.high) for band in result.negative.bands] == [
        pytest.approx((0.1, 0.8), rel=1e-4), pytest.approx((3, 10), rel=1e-4),
    ]  # fmt: skip
    assert band_words(result.positive.bands) == "no gradient (metric clip_fraction_high) for ratios 1.28 to 10"


def test_a_clipped_weight_still_learns() -> None:
    below, above = curves("cispo").positive.bands  # the weight is at its bound whatever the sign of A
    assert not below.is_strong
    assert not above.is_strong
    assert below.high == pytest.approx(0.8, rel=1e-4)
    assert above.low == pytest.approx(1.2, rel=1e-4)
    assert below.label == "still learns (metric clip_fraction_low)"
    assert above.label == "still learns (metric clip_fraction_high, soft_clip_fraction)"
    _, above = curves("cispo").negative.bands
    assert above.label == "still learns (metric clip_fraction_high)"


def test_the_ratio_ends_where_the_token_is_certain() -> None:
    assert curves("dppo_tv", Situation(old_probability=0.5)).ratios[-1] == pytest.approx(2)


@pytest.mark.parametrize("name", policy_loss_names())
def test_every_loss_has_curves(name: str) -> None:
    result = curves(name)
    for side in (result.positive, result.negative):
        assert len(side.losses) == len(side.gradients) == len(result.ratios)
        assert None not in side.gradients
    assert (result.note != "") == (policy_loss(name).scope != "token")


@pytest.mark.parametrize("name", ["vanilla", "gspo", "sapo", "aspo", "is_reinforce", "kimi"])
def test_the_gradient_is_the_slope_of_a_loss_without_detached_parts(name: str) -> None:
    result = curves(name)
    logs = [math.log(ratio) for ratio in result.ratios]
    # The weight of aspo is detached where A > 0.
    for side in [result.negative] if name == "aspo" else [result.positive, result.negative]:
        for index in range(1, len(logs) - 1):
            around = side.gradients[index - 1 : index + 2]
            if max(around) - min(around) > 0.2:  # type: ignore[operator, type-var]
                continue  # a jump
            slope = (side.losses[index + 1] - side.losses[index - 1]) / (logs[index + 1] - logs[index - 1])  # type: ignore[operator]
            assert min(around) - 0.02 <= slope <= max(around) + 0.02  # type: ignore[operator, type-var]


def test_wrong_situations() -> None:
    with pytest.raises(ConfigError, match="old_probability=1"):
        Situation(old_probability=1)
    with pytest.raises(ConfigError, match="widest=1 must be above 1"):
        ratio_curves(policy_loss("vanilla"), policy_loss("vanilla").options({}), widest=1)


@pytest.fixture
def _own() -> Iterator[None]:
    @register_policy_loss("test_own_loss")
    def own(t, *, alpha: float = 2.0):  # type: ignore[no-untyped-def]
        return -alpha * t.advantages * t.ratio()

    yield
    del POLICY_LOSSES.entries["test_own_loss"]


@pytest.mark.usefixtures("_own")
def test_a_custom_loss_has_a_curve() -> None:
    result = curves("test_own_loss", alpha=3.0)
    assert result.positive.gradients[at(result, 1.0)] == pytest.approx(-3)


# ------------------------------------------------------------------ KL


def test_k3_by_hand() -> None:
    result = kl_curves("k3", reference=0.3)
    index = min(range(len(result.d)), key=lambda each: abs(result.d[each] - 1))
    d = result.d[index]
    assert result.values[index] == pytest.approx(math.exp(-d) - 1 + d)
    assert result.slopes[index] == pytest.approx(1 - math.exp(-d))
    half = min(range(len(result.probabilities)), key=lambda each: abs(result.probabilities[each] - 0.5))
    p = result.probabilities[half]
    kl = p * math.log(p / 0.3) + (1 - p) * math.log((1 - p) / 0.7)
    assert result.expected_values[half] == pytest.approx(kl)
    assert result.expected_gradients[half] == pytest.approx(p - 0.3)  # that of the forward KL


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("gradient", KL_GRADIENTS)
def test_the_words_are_those_of_the_curves(estimator: str, gradient: str) -> None:
    result = kl_curves(estimator, gradient, reference=0.5)  # no clamp binds
    expected = torch.tensor(result.expected_gradients)
    fits = {
        "of the reverse KL": torch.allclose(expected, torch.tensor(result.reverse_gradients), atol=1e-9),
        "of the forward KL": torch.allclose(expected, torch.tensor(result.forward_gradients), atol=1e-9),
        "zero": bool((expected.abs() < 1e-9).all()),
    }
    assert [name for name, is_so in fits.items() if is_so] == [name for name in fits if f" {name}" in result.words]
    is_unbiased = torch.allclose(torch.tensor(result.expected_values), torch.tensor(result.reverse_values), atol=1e-9)
    assert ("value unbiased" in result.words) == is_unbiased


def test_older_tokens() -> None:
    assert "neither need hold" in kl_curves("k3", sampler="reference").words
    corrected = kl_curves("k3", "is_corrected", reference=0.5, sampler="reference")
    assert corrected.expected_gradients == pytest.approx(corrected.reverse_gradients)


def test_a_clamp_that_binds_is_named() -> None:
    assert "clamp of the estimate binds" in kl_curves("k3", reference=0.95).words
    assert "clamp" not in kl_curves("k3", reference=0.5).words


# ------------------------------------------------------------------ aggregation


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [
        (AggregationConfig(name="token_mean"), [1 / 10, 1 / 10, 1 / 10]),
        (AggregationConfig(name="token_sum"), [1, 1, 1]),
        (AggregationConfig(name="seq_mean_token_mean"), [1 / 6, 1 / 9, 1 / 15]),
        (AggregationConfig(name="seq_mean_token_sum"), [1 / 3, 1 / 3, 1 / 3]),
        (AggregationConfig(name="constant", length=8), [1 / 24, 1 / 24, 1 / 24]),
        (AggregationConfig(name="prompt_mean"), [1 / 10, 1 / 10, 1 / 10]),
        (AggregationConfig(name="per_component", negative_weight=0.5), [1 / 7, 0.5 / 3, 1 / 7]),
    ],
    ids=lambda value: value.name if isinstance(value, AggregationConfig) else "",
)
def test_weights_by_hand(aggregation: AggregationConfig, weights: list[float]) -> None:
    assert token_weights(completions_of([2, 3, 5]), aggregation) == pytest.approx(weights)


def test_wrong_lengths() -> None:
    with pytest.raises(ConfigError, match=r"lengths=\[3, 0\]"):
        completions_of([3, 0])
