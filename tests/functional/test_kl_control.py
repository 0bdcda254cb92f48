"""The adaptive KL coefficient: numbers of the paper's formula, its fixed point, its state."""

import json
import math
from dataclasses import asdict

import pytest

from toolkit.errors import ConfigError, DataError
from toolkit.functional.kl_control import AdaptiveKL


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        (6.0, 0.2),  # on target
        (6.6, 0.2 * (1 + 0.1 * 0.1)),  # 10 % above, gain 0.1
        (5.4, 0.2 * (1 - 0.1 * 0.1)),
        (60.0, 0.2 * (1 + 0.2 * 0.1)),  # the error is clipped
        (-3.0, 0.2 * (1 - 0.2 * 0.1)),
    ],
)
def test_one_step_by_hand(observed: float, expected: float) -> None:
    before = AdaptiveKL(0.2, target=6.0, horizon=1000.0)
    after = before.updated(observed, 100)
    assert after.coef == pytest.approx(expected, rel=1e-12)
    assert (after.target, after.horizon, before.coef) == (6.0, 1000.0, 0.2)


def test_it_brings_the_kl_to_its_target() -> None:
    control = AdaptiveKL(0.01, target=6.0, horizon=1000.0)
    for _ in range(2000):
        control = control.updated(1.2 / control.coef, 100)  # a world in which the KL is 1.2 / coef
    assert control.coef == pytest.approx(0.2, rel=1e-6)


def test_state_survives_a_checkpoint_in_json() -> None:
    control = AdaptiveKL(0.2, target=6.0, horizon=1000.0).updated(6.7, 64)
    state = json.loads(json.dumps(asdict(control)))
    assert AdaptiveKL(**state) == control
    assert AdaptiveKL(**state).updated(5.0, 64) == control.updated(5.0, 64)


@pytest.mark.parametrize(
    ("coef", "target", "horizon", "message"),
    [
        (-0.1, 6.0, 100.0, "coef=-0.1 .* at least 0"),
        (0.1, 0.0, 100.0, "target=0.0 .* above 0"),
        (0.1, 6.0, -1.0, "horizon=-1.0 .* above 0"),
        (math.nan, 6.0, 1.0, "coef=nan"),
        (0.1, math.inf, 1.0, "target=inf"),
    ],
)
def test_settings_are_checked(coef: float, target: float, horizon: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveKL(coef, target=target, horizon=horizon)


def test_observations_are_checked() -> None:
    control = AdaptiveKL(0.2, target=6.0, horizon=100.0)
    with pytest.raises(DataError, match="observed_kl=nan must be a finite number"):
        control.updated(math.nan, 10)
    with pytest.raises(DataError, match=r"num_samples=500 .* below 5 horizons"):
        control.updated(6.0, 500)
    with pytest.raises(DataError, match="num_samples=-1"):
        control.updated(6.0, -1)
    assert control.updated(0.0, 499).coef > 0
