"""Tokens whose log-probability the sampler did not report: refused, or rejected as by a correction."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit import DataError, GRPOLossConfig, GRPOLossContext, LossRunner, RLLossContextInputItem
from toolkit.head import TokenScores
from toolkit.metrics import merge_metrics, to_floats

TIS = {"action": "clamp_upper", "upper": 2.0}
SEQUENCE = {"granularity": "sequence", "reduction": "mean"}
MASK = {"action": "mask", "lower": 0.5, "upper": 2.0}
NORMALIZED = {**TIS, "normalize": True}
CURRENT = {**MASK, **SEQUENCE, "between": "current_rollout", "denominator": "original"}
CHOICES: dict[str, dict[str, Any]] = {
    "tis": {"correction": [TIS]},
    "sequence": {"correction": [{**TIS, **SEQUENCE}]},
    "normalized": {"correction": [{**NORMALIZED, **SEQUENCE}]},
    "original": {"correction": [{**MASK, "denominator": "original"}]},
    "survivors": {"correction": [{**MASK, "denominator": "survivors"}, NORMALIZED]},
    "current": {"correction": [CURRENT]},
    "anchor": {"policy_loss_cfg": {"loss_type": "vanilla", "anchor": "rollout"}},
    "kl": {
        "correction": [TIS],
        "correction_on_kl": True,
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_gradient": "is_corrected",
        "kl_anchor": "rollout",
    },
}
MISSING = torch.tensor([[False, True, False, False], [False, False, False, True]])


def item(value: float, **changes: Any) -> tuple[RLLossContextInputItem, Tensor]:
    draw = torch.Generator().manual_seed(3)
    old, noise, ref, new = (0.2 * torch.randn(2, 4, generator=draw, dtype=torch.float64) for _ in range(4))
    fields = {
        "shifted_labels": torch.zeros(2, 4, dtype=torch.int64),
        "advantages": torch.tensor([[1.0], [-0.5]], dtype=torch.float64),
        "old_logprobs": old - 2,
        "ref_logprobs": old - 2 + ref,
        "rollout_logprobs": (old - 2 + noise).masked_fill(MISSING, value),
    }
    return RLLossContextInputItem(**{**fields, **changes}), old - 2 + new


def evaluate(cfg: GRPOLossConfig, given: RLLossContextInputItem, logprobs: Tensor) -> tuple[Tensor, Tensor, dict]:
    logprobs = logprobs.clone().requires_grad_()
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([given], cfg)
    context = GRPOLossContext(cfg, kwargs)
    scored = (context.scored_labels() != -100).reshape(-1).nonzero().squeeze(-1)
    scores = TokenScores(logprobs.reshape(-1)[scored], None)
    loss, found = context.loss_from_scores(scores, kwargs.take(scored))
    (grad,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), grad, to_floats({**found, **merge_metrics([kwargs.step_metrics])})


@pytest.mark.parametrize("value", [-math.inf, math.nan])
@pytest.mark.parametrize("choice", CHOICES)
def test_such_a_token_has_no_weight_and_changes_no_other(choice: str, value: float) -> None:
    cfg = GRPOLossConfig(missing_rollout="reject", **CHOICES[choice])
    loss, grad, metrics = evaluate(cfg, *item(value))
    assert loss.isfinite()
    assert (grad[MISSING] == 0).all()
    assert metrics["rollout_missing"] == 2 / 8
    # The others are as if it were masked; 6 tokens are left, and 8 counted unless survivors are.
    masked, logprobs = item(-2.0, shifted_labels=torch.zeros(2, 4, dtype=torch.int64).masked_fill(MISSING, -100))
    expected, expected_grad, _ = evaluate(GRPOLossConfig(**CHOICES[choice]), masked, logprobs)
    share = 1.0 if choice == "survivors" else 6 / 8
    torch.testing.assert_close(loss, share * expected, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(grad, share * expected_grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_early_and_late_corrections_agree(value: float) -> None:
    cfg = GRPOLossConfig(missing_rollout="reject", correction=[CURRENT])
    given, logprobs = item(value)
    late, early = (evaluate(cfg, each, logprobs) for each in (given, given.replace(current_logprobs=logprobs)))
    torch.testing.assert_close(late[:2], early[:2], rtol=1e-12, atol=0)


def test_such_a_token_is_not_in_the_mean_of_its_sequence() -> None:
    # Three log ratios of 0.8 are above log 2 = 0.69; with the old policy's, about 0, their mean would be 0.6.
    given, logprobs = item(math.nan)
    rollout = (logprobs - 0.8).masked_fill(MISSING, math.nan)
    for fields in ({}, {"current_logprobs": logprobs}):
        cfg = GRPOLossConfig(missing_rollout="reject", correction=[CURRENT])
        loss, grad, _ = evaluate(cfg, given.replace(rollout_logprobs=rollout, **fields), logprobs)
        assert loss == 0
        assert not grad.any()


def test_a_sequence_without_a_report_is_rejected() -> None:
    given, logprobs = item(math.nan)
    rollout = given.rollout_logprobs.clone()
    rollout[0] = math.nan
    for choice in CHOICES.values():
        cfg = GRPOLossConfig(missing_rollout="reject", **choice)
        loss, grad, _ = evaluate(cfg, given.replace(rollout_logprobs=rollout), logprobs)
        assert loss.isfinite()
        assert (grad[0] == 0).all()
        assert grad[1].any()


def test_ratio_of_a_sequence_anchored_at_the_sampler_stays_finite() -> None:
    policy = {"loss_type": "gspo", "anchor": "rollout"}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, missing_rollout="reject", aggregation="seq_mean_token_mean")
    loss, grad, _ = evaluate(cfg, *item(-math.inf))
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("choice", CHOICES)
def test_otherwise_it_is_refused_and_the_setting_named(choice: str) -> None:
    given, _ = item(-math.inf)
    with pytest.raises(DataError, match=r"rollout_logprobs\[0, 1\] = -inf .* loss.missing_rollout=reject"):
        GRPOLossContext.build_batches_loss_kwargs([given], GRPOLossConfig(**CHOICES[choice]))


def test_a_value_above_0_is_no_missing_one() -> None:
    given, _ = item(math.inf)
    with pytest.raises(DataError, match="a log-probability is at most 0"):
        GRPOLossContext.build_batches_loss_kwargs([given], GRPOLossConfig(missing_rollout="reject", correction=[TIS]))


def test_on_the_command_line_with_micro_batches() -> None:
    runner = LossRunner.from_overrides(["correction=tis", "loss.missing_rollout=reject", "mode=chunk"])
    torch.manual_seed(0)
    hidden, head = torch.randn(2, 4, 8, requires_grad=True), torch.nn.Linear(8, 5, bias=False)
    given, _ = item(-math.inf)
    fields = {name: value.float() for name, value in given.tensors() if name not in ("shifted_labels", "ref_logprobs")}
    result = runner(hidden, head.weight, shifted_labels=given.shifted_labels, **fields)
    result.backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()
    assert (hidden.grad[MISSING] == 0).all()
    assert result.metrics["rollout_missing"] == 0.25
