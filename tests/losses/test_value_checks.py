"""What items and kwargs hold is checked once a step: values, the config that built them, changes in place."""

from __future__ import annotations

import math

import pytest
import torch

from toolkit import DataError, GRPOLossConfig
from toolkit.errors import ConfigError
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.record import PerToken

HIDDEN, WEIGHT = torch.zeros(1, 3, 2), torch.zeros(7, 2)
LOGPROBS = [name for name in RLLossContextInputItem.model_fields if name.endswith("_logprobs") and "topk" not in name]


def item(**fields: torch.Tensor) -> RLLossContextInputItem:
    return RLLossContextInputItem(
        shifted_labels=torch.tensor([[3, 4, -100]]), **{"advantages": torch.ones(1, 3), **fields}
    )


def kwargs_of(cfg, **fields):
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item(**fields)], cfg)
    return kwargs


def forward(cfg, kwargs):
    return cfg.loss_ctx_cls(cfg, kwargs).forward(HIDDEN, WEIGHT)[0]


@pytest.mark.parametrize("name", LOGPROBS)
def test_a_log_probability_is_at_most_0(name: str) -> None:
    cfg = GRPOLossConfig()
    right = torch.tensor([[-0.2, math.log(1.005), 0.9]])  # rounding to bf16; the last position is not scored
    kwargs_of(cfg, **{name: right})
    probabilities = torch.tensor([[-0.2, 0.82, -0.1]])
    with pytest.raises(DataError, match=rf"data_batches\[0\].{name}\[0, 1\] = 0.82 .*did you pass prob"):
        kwargs_of(cfg, **{name: probabilities})


def test_unread_log_probabilities_may_be_missing() -> None:
    unreported = torch.tensor([[math.nan, -1.0, 0.5]])
    kwargs_of(GRPOLossConfig(), rollout_logprobs=unreported)
    reads_it = GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", "anchor": "rollout"})
    with pytest.raises(DataError, match=r"rollout_logprobs\[0, 0\] = nan at a scored position"):
        kwargs_of(reads_it, rollout_logprobs=unreported)


@pytest.mark.parametrize(
    ("built", "used", "words"),
    [
        ({}, {"aggregation": "seq_mean_token_sum"}, "aggregation of policy is .*token_mean.*seq_mean_token_sum"),
        ({"gradient_reduction": "sum"}, {}, "gradient_reduction is 'sum', but the context's config has 'mean'"),
        ({"ignore_idx": -1}, {}, "ignore_idx is -1"),
        ({}, {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.1}, "aggregation of kl is absent"),
        ({}, {"policy_loss_cfg": {"loss_type": "gspo"}}, "loss_type is 'vanilla'"),
        (
            {"correction": [{"action": "clamp_upper", "upper": 2.0}]},
            {},
            r"correction is .*clamp_upper.*has \(\)",
        ),
    ],
)
def test_kwargs_of_another_config_are_refused(built: dict, used: dict, words: str) -> None:
    fields = {
        "ref_logprobs": -torch.ones(1, 3),
        "rollout_logprobs": -torch.ones(1, 3),
        "old_logprobs": -torch.ones(1, 3),
    }
    kwargs = kwargs_of(GRPOLossConfig(**built), **fields)
    with pytest.raises(ConfigError, match=f"built with a config where {words}"):
        forward(GRPOLossConfig(**used), kwargs)


def test_settings_of_the_head_and_coefficients_may_change() -> None:
    kl = {"use_kl_loss": True, "kl_loss_type": "k3"}
    kwargs = kwargs_of(GRPOLossConfig(**kl, kl_loss_coef=0.1), ref_logprobs=-torch.ones(1, 3))
    other = GRPOLossConfig(**kl, kl_loss_coef=0.2, mode="chunk", chunk_size=2)
    assert forward(other, kwargs).isfinite()


def test_a_change_in_place_after_building_is_refused() -> None:
    cfg, advantages = GRPOLossConfig(), torch.ones(1, 3)
    advantages.mul_(2)  # before building anything may change
    kwargs = kwargs_of(cfg, advantages=advantages)
    assert forward(cfg, kwargs).item() == pytest.approx(-2)
    assert forward(cfg, kwargs.to("cpu")).item() == pytest.approx(-2)
    advantages.mul_(100)
    with pytest.raises(DataError, match=r"advantages was changed in place after build_batches_loss_kwargs"):
        forward(cfg, kwargs)
    assert forward(cfg, kwargs_of(cfg, advantages=advantages)).item() == pytest.approx(-200)


def test_labels_replaced_after_building_are_checked_again() -> None:
    cfg = CELossConfig()
    labels = item().shifted_labels
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([cfg.loss_ctx_cls.item_cls(shifted_labels=labels)], cfg)
    assert forward(cfg, kwargs).item() == pytest.approx(math.log(7), rel=1e-6)
    with pytest.raises(DataError, match=r"shifted_labels\[0, 1\] = 9 lies outside the vocabulary of 7"):
        forward(cfg, kwargs.replace(shifted_labels=torch.tensor([[3, 9, -100]])))


def test_fields_that_a_loss_requires_must_be_finite() -> None:
    from typing import Annotated

    from toolkit import LossTerm, ScoredLossContext
    from toolkit.losses.config.base import BaseLossConfig
    from toolkit.losses.items import LossContextInputItem
    from toolkit.losses.kwargs import BaseLossKwargs

    class Item(LossContextInputItem):
        margins: Annotated[torch.Tensor, PerToken(pad=0.0)]

    class Kwargs(BaseLossKwargs):
        margins: Annotated[torch.Tensor, PerToken(pad=0.0)]

    class Context(ScoredLossContext):
        item_cls, kwargs_cls = Item, Kwargs

        def token_losses(self, scores, loss_kwargs):
            return -scores.logprobs * loss_kwargs.margins

    class Config(BaseLossConfig):
        context = Context

        @property
        def terms(self):
            return (LossTerm(),)

    wrong = Item(shifted_labels=torch.tensor([[3, 4, -100]]), margins=torch.tensor([[1.0, math.inf, math.nan]]))
    with pytest.raises(DataError, match=r"data_batches\[0\].margins\[0, 1\] = inf at a scored position"):
        Context.build_batches_loss_kwargs([wrong], Config())


@pytest.mark.parametrize("advantages", [torch.tensor([[1], [-1]]), torch.tensor([[1], [-1]], dtype=torch.int32)])
def test_integer_advantages_are_numbers(advantages: torch.Tensor) -> None:
    labels = torch.zeros(2, 3, dtype=torch.int64)
    given = RLLossContextInputItem(shifted_labels=labels, advantages=advantages)
    assert given.advantages is not None
    assert given.advantages.dtype == torch.float32
    assert given.advantages.tolist() == [[1.0] * 3, [-1.0] * 3]
    with pytest.raises(DataError, match=r"advantages has dtype torch.bool; it must be a numeric tensor"):
        RLLossContextInputItem(shifted_labels=labels, advantages=advantages > 0)
    with pytest.raises(DataError, match=r"old_logprobs has dtype .* it must be a floating-point tensor"):
        RLLossContextInputItem(shifted_labels=labels, old_logprobs=-advantages)
