"""OREAL: hand-worked numbers, a slow reference, edges without a positive or a negative token, layouts and errors."""

import math

import pytest
import torch
from torch import Tensor

from tests.conftest import random_head, random_item
from tests.losses.evaluation import assert_same, cut, evaluate
from toolkit import (
    ConfigError,
    DataError,
    GRPOLossConfig,
    GRPOLossContext,
    LossRunner,
    OrealLossConfig,
    OrealLossContext,
    RLLossContextInputItem,
)
from toolkit.compose.build import build_loss
from toolkit.compose.tree import compose_config

FACTORS = {
    "positive_loss_factor": 2.0,
    "pos_sft_loss_weight": 0.5,
    "pos_policy_loss_weight": 0.7,
    "negative_loss_factor": 0.3,
}


def coin(advantages: list[float], old: list[float], **fields) -> tuple[RLLossContextInputItem, tuple]:
    """Tokens of probability 1/2 each, whatever the hidden state."""
    item = RLLossContextInputItem(
        shifted_labels=torch.zeros(1, len(advantages), dtype=torch.int64),
        advantages=torch.tensor([advantages], dtype=torch.float64),
        old_logprobs=torch.tensor([old], dtype=torch.float64),
        **fields,
    )
    hidden = torch.ones(1, len(advantages), 1, dtype=torch.float64, requires_grad=True)
    weight = torch.zeros(2, 1, dtype=torch.float64, requires_grad=True)
    return item, (hidden, weight, torch.zeros(2, dtype=torch.float64, requires_grad=True))


def test_by_hand() -> None:
    # Two tokens with A = 1 and ratio 1: policy loss -1, NLL log 2. One with A = -2, ratio 1: policy loss 2.
    old = [math.log(1 / 2)] * 3
    item, head = coin([1.0, 1.0, -2.0], old)
    loss, _, metrics = evaluate(OrealLossConfig(), [item], [head])
    assert loss.item() == pytest.approx(math.log(2) - 1 + 2)
    assert metrics["positive_nll_loss"] == pytest.approx(math.log(2))
    assert metrics["denominator_positive"] == 2
    assert metrics["denominator_negative"] == 1
    # 2 x (0.5 log 2 - 0.7 x 1) + 0.3 x 2
    weighted, _, _ = evaluate(OrealLossConfig(**FACTORS), [item], [head])
    assert weighted.item() == pytest.approx(math.log(2) - 1.4 + 0.6)


def test_advantage_zero_counts_as_not_positive() -> None:
    # A = 0 has policy loss 0 but is one of the N- = 2 tokens that -3 is divided by: 3 / 2.
    item, head = coin([0.0, -3.0], [math.log(1 / 2)] * 2)
    assert evaluate(OrealLossConfig(), [item], [head])[0].item() == pytest.approx(1.5)


def test_the_kl_is_a_mean_over_all_tokens() -> None:
    # Each token has k1 = log(1/2) - log(1/4) = log 2, and so has their mean, whatever the factors and signs.
    ref = torch.full((1, 3), math.log(1 / 4), dtype=torch.float64)
    item, head = coin([1.0, 1.0, -2.0], [math.log(1 / 2)] * 3, ref_logprobs=ref)
    without, _, _ = evaluate(OrealLossConfig(**FACTORS), [item], [head])
    kl = {"use_kl_loss": True, "kl_loss_type": "k1", "kl_gradient": "straight_through", "kl_loss_coef": 0.1}
    loss, _, _ = evaluate(OrealLossConfig(**FACTORS, **kl), [item], [head])
    assert (loss - without).item() == pytest.approx(0.1 * math.log(2))


def test_the_entropy_is_a_mean_over_all_tokens() -> None:
    # That of a coin is log 2, whatever the factors and signs.
    item, head = coin([1.0, 1.0, -2.0], [math.log(1 / 2)] * 3)
    without, _, _ = evaluate(OrealLossConfig(**FACTORS), [item], [head])
    loss, _, _ = evaluate(OrealLossConfig(**FACTORS, entropy_coef=0.1), [item], [head])
    assert (loss - without).item() == pytest.approx(-0.1 * math.log(2))


@pytest.mark.parametrize("signs", ["positive", "negative", "none"])
def test_an_empty_side_is_zero(signs: str) -> None:
    # XTuner divides by N- = 0 here and gives NaN, because ignored positions carry an advantage that is not positive.
    item, head = random_item(), random_head()
    advantages = {"positive": item.advantages.abs(), "negative": -item.advantages.abs(), "none": item.advantages}[signs]
    masked = item.shifted_labels == -100 if signs != "none" else torch.ones_like(item.shifted_labels, dtype=torch.bool)
    item = item.replace(
        shifted_labels=item.shifted_labels.masked_fill(masked, -100), advantages=advantages.masked_fill(masked, -1.0)
    )
    loss, grads, metrics = evaluate(OrealLossConfig(), [item], [head])
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert (loss.item() == 0) == (signs == "none")
    assert (metrics["positive_nll_loss"] > 0) == (signs == "positive")


def slow(cfg: OrealLossConfig, item: RLLossContextInputItem, logprobs: Tensor) -> float:
    """The definition, token by token: PPO clip with dual clip for the policy loss."""
    rows = [
        (float(a), float(new), float(old))
        for y, a, new, old in zip(
            item.shifted_labels.flatten(),
            item.advantages.flatten(),
            logprobs.detach().flatten(),
            item.old_logprobs.flatten(),
            strict=True,
        )
        if int(y) != -100
    ]
    num_positive = sum(a > 0 for a, _, _ in rows)
    total = 0.0
    for a, new, old in rows:
        ratio = math.exp(new - old)
        loss = max(-a * ratio, -a * min(max(ratio, 0.8), 1.2))
        if a > 0:
            factor = cfg.positive_loss_factor / num_positive
            total += factor * (cfg.pos_policy_loss_weight * loss - cfg.pos_sft_loss_weight * new)
        else:
            total += cfg.negative_loss_factor / (len(rows) - num_positive) * min(loss, -3.0 * a)
    return total


@pytest.mark.parametrize("factors", [{}, FACTORS])
def test_against_the_slow_reference(factors: dict) -> None:
    item, (hidden, weight, bias) = random_item(), random_head()
    cfg = OrealLossConfig(**factors)
    labels = item.shifted_labels.clamp(min=0).unsqueeze(-1)
    logprobs = (hidden @ weight.T + bias).log_softmax(-1).gather(-1, labels).squeeze(-1)
    loss, _, _ = evaluate(cfg, [item], [(hidden, weight, bias)])
    assert loss.item() == pytest.approx(slow(cfg, item, logprobs), rel=1e-12)


def test_is_grpo_with_two_components_and_imitation() -> None:
    item, head = random_item(), random_head()
    aggregation = {"name": "per_component", "positive_weight": 1.4, "negative_weight": 0.3}
    grpo = GRPOLossConfig(aggregation=aggregation, positive_nll_coef=1.0)
    kwargs = GRPOLossContext.build_batches_loss_kwargs([item], grpo)
    expected, _ = GRPOLossContext(grpo, kwargs[0]).forward(*head)
    assert torch.equal(evaluate(OrealLossConfig(**FACTORS), [item], [head])[0], expected.detach())


@pytest.mark.parametrize("policy_loss", ["vanilla", "gspo", "cispo", "reinforce"])
@pytest.mark.parametrize("chunk_size", [1, 4, 1024])
def test_chunk_equals_eager(policy_loss: str, chunk_size: int) -> None:
    item, head = random_item(), random_head()
    shared = {
        **FACTORS,
        "policy_loss_cfg": {"loss_type": policy_loss},
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_loss_coef": 0.1,
    }
    eager = evaluate(OrealLossConfig(**shared), [item], [head])
    chunked = evaluate(OrealLossConfig(**shared, mode="chunk", chunk_size=chunk_size), [item], [head])
    assert_same(chunked, eager)


@pytest.mark.parametrize("lengths", [[4, 4], [1, 7], [2, 3, 3]])
def test_micro_batches_equal_one_batch(lengths: list[int]) -> None:
    whole, (hidden, weight, bias) = random_item((8, 6)), random_head((8, 6))
    cfg = OrealLossConfig(**FACTORS, use_kl_loss=True, kl_loss_type="k3", kl_loss_coef=0.1)
    expected = evaluate(cfg, [whole], [(hidden, weight, bias)])
    parts, leaves = cut(whole, hidden, lengths)
    loss, grads, metrics = evaluate(cfg, parts, [(leaf, weight, bias) for leaf in leaves])
    assert_same((loss, [torch.cat(grads[:-2]), *grads[-2:]], metrics), expected)


def test_masked_positions_may_hold_anything() -> None:
    item, head = random_item(), random_head()
    masked = item.shifted_labels == -100
    dirty = item.replace(
        **{name: value.masked_fill(masked, math.nan) for name, value in item.tensors() if value.is_floating_point()}
    )
    clean, spoilt = (evaluate(OrealLossConfig(**FACTORS), [own], [head]) for own in (item, dirty))
    assert torch.equal(clean[0], spoilt[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(clean[1], spoilt[1], strict=True))


def test_factors_are_checked_and_averaging_is_its_own() -> None:
    with pytest.raises(ConfigError, match="negative_loss_factor"):
        OrealLossConfig(negative_loss_factor=-1.0)
    with pytest.raises(ConfigError, match="aggregation is not a setting"):
        OrealLossConfig(aggregation="token_mean")
    with pytest.raises(ConfigError, match="aggregation=token_mean has no effect: OrealLossConfig has no aggregation"):
        compose_config(["loss=oreal", "aggregation=token_mean"])
    with pytest.raises(ConfigError, match="takes a OrealLossConfig, not a GRPOLossConfig"):
        OrealLossContext.build_batches_loss_kwargs([random_item()], GRPOLossConfig())
    with pytest.raises(DataError, match="advantages is missing"):
        OrealLossContext.build_batches_loss_kwargs([random_item().replace(advantages=None)], OrealLossConfig())


def test_from_the_command_line() -> None:
    cfg = build_loss(compose_config(["loss=oreal", "policy_loss=cispo", "loss.negative_loss_factor=0.3", "kl=k2"]))
    assert isinstance(cfg, OrealLossConfig)
    assert cfg.policy_loss_cfg["loss_type"] == "cispo"
    assert cfg.aggregation.negative_weight == 0.3
    item, head = random_item(), random_head()
    result = LossRunner(cfg)(*head, **dict(item.tensors()))
    assert torch.equal(result.loss.detach(), evaluate(cfg, [item], [head])[0])
