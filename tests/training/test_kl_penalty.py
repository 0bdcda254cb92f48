"""KL in the reward, and a coefficient that adapts."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit import ConfigError, GRPOLossConfig
from toolkit.compose.build import build_config
from toolkit.compose.tree import compose_config
from toolkit.metrics import to_floats
from toolkit.training.config import KLControlConfig
from toolkit.training.kl_penalty import KLPenalty


def test_rewards_less_kl_by_hand() -> None:
    # Two completions of one prompt: log ratios .2 and .3 (KL .5), and -.1 on the only scored token of the second.
    penalty = KLPenalty(KLControlConfig(reward_type="k1", reward_coef=0.1), GRPOLossConfig())
    own = torch.tensor([[-1.0, -2.0], [-1.0, math.nan]])
    ref = torch.tensor([[-1.2, -2.3], [-0.9, math.inf]])
    scored = torch.tensor([[True, True], [True, False]])
    rewards, metrics = penalty.off_rewards(torch.tensor([[1.0, 0.0]]), own, ref, scored)
    assert rewards.tolist() == [pytest.approx([1 - 0.05, 0.01])]
    assert to_floats(metrics)["kl_completion"] == pytest.approx((0.5 - 0.1) / 2)
    assert penalty.needs_reference


@pytest.mark.parametrize(("observed", "factor"), [(2.0, 1.02), (0.5, 0.98), (1.1, 1.01)])
def test_the_coefficient_follows_the_target(observed: float, factor: float) -> None:
    # Relative error of at most 0.2, times 100 completions of a horizon of 1000.
    control = KLControlConfig(reward_type="k1", reward_coef=0.5, target=1.0, horizon=1000)
    penalty = KLPenalty(control, GRPOLossConfig())
    assert penalty.observe({"kl_completion": observed}, 100) == {"kl_coef": 0.5}
    assert penalty.reward_coef == pytest.approx(0.5 * factor)
    fresh = KLPenalty(control, GRPOLossConfig())
    fresh.restore(penalty.state())
    assert fresh.reward_coef == penalty.reward_coef
    assert penalty.observe({"kl_completion": math.nan}, 100) == {"kl_coef": penalty.reward_coef}


def test_the_coefficient_of_the_loss_adapts_too() -> None:
    cfg = GRPOLossConfig(use_kl_loss=True, kl_loss_type="k2", kl_loss_coef=0.5)
    penalty = KLPenalty(KLControlConfig(target=1.0, horizon=1000), cfg)
    assert penalty.loss_config(cfg) == cfg
    penalty.observe({"kl_ref": 0.5, "completion_tokens": 4.0}, 100)  # 2 nats a completion
    assert penalty.loss_config(cfg).kl_loss_coef == pytest.approx(0.51)  # type: ignore[attr-defined]
    assert cfg.kl_loss_coef == 0.5


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["kl_control=adaptive"], "there is no KL to steer"),
        (["kl_control=adaptive", "kl=k2", "kl_control.reward_type=k1"], "both kl_control.reward_type and the loss"),
        (["kl_control=adaptive", "kl=k2", "kl_control.horizon=100"], "make it more than 204"),
        (["kl_control.reward_type=k1", "loss=ce"], "no effect without rewards"),
        (["policy_loss=real", "training.micro_batch_size=4"], "training.micro_batch_size=8 or more"),
        (["policy_loss=opd"], "no teacher"),
    ],
)
def test_what_cannot_work_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_config(compose_config(overrides))
