"""Records of tokens: by hand, and for every policy loss beside the gradient of the whole loss."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import toolkit
from toolkit import ConfigError, GRPOLossConfig, RLLossContextInputItem
from toolkit.compose.tree import load_loss
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.head import TokenScores
from toolkit.losses.samples import random_batch
from toolkit.losses.token_records import STATUSES, TokenRecords, token_records

NAMES = list(STATUSES)


def records_of(cfg: GRPOLossConfig, logprobs: list[float], **fields: list[float]) -> TokenRecords:
    values = {name: torch.tensor([each], dtype=torch.float64) for name, each in fields.items()}
    item = RLLossContextInputItem(shifted_labels=torch.zeros(1, len(logprobs), dtype=torch.int64), **values)
    context = cfg.loss_ctx_cls
    kwargs = context.build_batches_loss_kwargs([item], cfg)
    return token_records(context(cfg, kwargs[0]), TokenScores(torch.tensor([logprobs], dtype=torch.float64)))


def test_ppo_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.1, 1.5, 0.5 and 1 with the clip range [0.8, 1.2]; the weight is 1/6 each."""
    ratios, advantages = [1.5, 0.5, 1.1, 1.5, 0.5, 1.0], [1.0, -1.0, 2.0, -1.0, 1.0, 0.0]
    found = records_of(
        GRPOLossConfig(),
        [math.log(0.2 * ratio) for ratio in ratios],
        old_logprobs=[math.log(0.2)] * 6,
        advantages=advantages,
    )
    status = [NAMES[code] for code in found.status[0].tolist()]
    assert status == ["clipped_high", "clipped_low", "learns", "learns", "learns", "no_advantage"]
    assert found.ratio[0].tolist() == pytest.approx(ratios)
    assert found.weight[0].tolist() == pytest.approx([1 / 6] * 6)
    assert found.coefficient is not None
    assert found.coefficient[0].tolist() == pytest.approx([0, 0, 2.2, -1.5, 0.5, 0])


def test_a_policy_loss_of_two_terms() -> None:
    """OREAL: factor 2 and the mean over the good token, factor 1 and the mean over the two bad ones; no SFT term."""
    cfg = load_loss(
        ["loss=oreal", "loss.positive_loss_factor=2", "loss.negative_loss_factor=1", "loss.pos_sft_loss_weight=0"]
    )
    logprobs = [math.log(0.2)] * 3
    found = records_of(cfg, logprobs, old_logprobs=logprobs, advantages=[1.0, -1.0, -3.0])
    assert found.weight[0].tolist() == pytest.approx([2.0, 0.5, 0.5])
    assert found.coefficient is not None
    assert found.coefficient[0].tolist() == pytest.approx([1.0, -1.0, -3.0])
    assert [NAMES[code] for code in found.status[0].tolist()] == ["learns"] * 3


def test_a_kl_counts_and_does_not_unclip() -> None:
    # k1: beta at every token, minus the advantage times the ratio.
    cfg = GRPOLossConfig(use_kl_loss=True, kl_loss_type="k1", kl_loss_coef=0.1)
    found = records_of(cfg, [-1.0, -0.5], old_logprobs=[-1.0, -1.0], ref_logprobs=[-2.0, -2.0], advantages=[3.0, 1.0])
    assert found.coefficient is not None
    assert found.coefficient[0].tolist() == pytest.approx([2.9, -0.1])
    assert [NAMES[code] for code in found.status[0].tolist()] == ["learns", "clipped_high"]


@pytest.mark.parametrize("denominator", ["original", "survivors"])
@pytest.mark.parametrize("between", ["old_rollout", "current_rollout"])
def test_a_rejected_token_is_named(between: str, denominator: str) -> None:
    """The ratios are 1 and e^8."""
    correction = {"action": "mask", "lower": 0.5, "upper": 2.0, "between": between, "denominator": denominator}
    cfg = GRPOLossConfig(correction=[correction])
    current, fields = [-1.0, -1.0], {"old_logprobs": [-1.0, -1.0], "rollout_logprobs": [-1.0, -9.0]}
    if (between, denominator) == ("current_rollout", "survivors"):
        fields["current_logprobs"] = current
    found = records_of(cfg, current, **fields, advantages=[1.0, 1.0])
    # Who is left is known before the kwargs, and the others then have no label.
    expected = "unscored" if denominator == "survivors" else "rejected"
    assert [NAMES[code] for code in found.status[0].tolist()] == ["learns", expected]


CONFIGS = Path(toolkit.__file__).parents[1] / "conf"
CHOICES = [
    *(f"{group}={path.stem}" for group in ("kl", "correction") for path in sorted((CONFIGS / group).glob("*.yaml"))),
    *(
        f"loss={path.relative_to(CONFIGS / 'loss').with_suffix('')}"
        for path in sorted((CONFIGS / "loss/preset").rglob("*.yaml"))
    ),
]
"""Every choice of the groups that change a policy loss beside `policy_loss`."""


@pytest.mark.parametrize(
    "choice",
    [
        *(f"policy_loss={name}" for name in policy_loss_names()),
        *(pytest.param(choice, marks=pytest.mark.slow) for choice in CHOICES),
    ],
)
def test_the_coefficients_are_the_gradient_of_every_loss(choice: str) -> None:
    cfg = load_loss([choice])
    batch = random_batch(cfg, seed=3, garbage=0.0)
    batch = batch.with_current_logprobs(cfg)
    context = cfg.loss_ctx_cls
    ctx = context(cfg, context.build_batches_loss_kwargs([batch.item], cfg)[0])
    hidden = batch.hidden_states.clone().requires_grad_()
    ctx.forward(hidden, batch.head_weight, batch.head_bias)[0].backward()
    assert hidden.grad is not None
    all_logprobs = (batch.hidden_states @ batch.head_weight.T + batch.head_bias).log_softmax(-1)
    labels = batch.item.shifted_labels.clamp(min=0).unsqueeze(-1)
    logprobs, entropy = all_logprobs.gather(-1, labels).squeeze(-1), -(all_logprobs.exp() * all_logprobs).sum(-1)
    found = token_records(ctx, TokenScores(logprobs, entropy))
    if found.coefficient is None:
        pytest.skip("reads candidates besides the sampled tokens")
    # The gradient of a hidden state is that of its log-probability, times this direction.
    direction = batch.head_weight[labels.squeeze(-1)] - all_logprobs.exp() @ batch.head_weight
    slope = (hidden.grad * direction).sum(-1) / (direction * direction).sum(-1)
    torch.testing.assert_close(-found.coefficient * found.weight, slope, atol=1e-12, rtol=1e-9)
    # A correction with the denominator "survivors" takes the labels of rejected tokens away.
    is_scored = ctx.loss_kwargs.shifted_labels != cfg.ignore_idx
    assert ((found.status == NAMES.index("unscored")) == ~is_scored).all()
    assert (slope[found.status == NAMES.index("learns")] != 0).all()


def test_log_ratios_without_bounds() -> None:
    """Presets of TRL have none; 25 nats are beyond the usual bound of 20."""
    cfg = GRPOLossConfig(log_ratio_range=(None, None))
    found = records_of(cfg, [-1.0, -1.0], old_logprobs=[-26.0, -1.0], advantages=[1.0, 1.0])
    assert found.ratio[0].tolist() == pytest.approx([math.exp(25), 1.0])
    assert [NAMES[code] for code in found.status[0].tolist()] == ["clipped_high", "learns"]


def test_another_loss_has_none() -> None:
    cfg = load_loss(["loss=ce"])
    batch = random_batch(cfg)
    kwargs = cfg.loss_ctx_cls.build_batches_loss_kwargs([batch.item], cfg)[0]
    with pytest.raises(ConfigError, match="made for policy losses, but this is a CELossContext"):
        token_records(cfg.loss_ctx_cls(cfg, kwargs), TokenScores(batch.item.shifted_labels.double()))
