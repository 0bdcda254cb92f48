"""Losses over the head's passes: which one serves, and that every registered loss is the same in all of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import random_head, random_item
from toolkit import (
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    ConfigError,
    DataError,
    GRPOLossConfig,
    GRPOLossContext,
    LossRunner,
    RLLossContextInputItem,
    register_policy_loss,
)
from toolkit.functional.policy import registry
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.head import fused_loss
from toolkit.losses import scored

SHAPE = (4, 13)
FULLY = ("vanilla", "gspo", "real", "batch_centred")
"""One loss of each scope; the head cannot tell the others from them."""
ONE_AT_A_TIME = (
    (torch.float64, "plain", "nothing"),
    (torch.float32, "plain", "nothing"),
    (torch.float64, "kl", "nothing"),
    (torch.float64, "entropy", "nothing"),
    (torch.float64, "plain", "head"),
    (torch.float64, "entropy", "head"),
    (torch.float32, "entropy", "head"),
    (torch.float64, "kl", "trunk"),
)
"""Dtype, terms, what is frozen; an entropy bonus over a frozen head takes another pass than either alone."""
LIGHTLY = ((torch.float64, "kl", "nothing"), (torch.float64, "plain", "head"), (torch.float32, "plain", "nothing"))
"""What every other registered loss runs through, one of them each."""


def combinations() -> Iterator[tuple[str, torch.dtype, str, str]]:
    for i, name in enumerate([*policy_loss_names(), "batch_centred"]):
        for choice in ONE_AT_A_TIME if name in FULLY else LIGHTLY[i % 3 : i % 3 + 1]:
            yield name, *choice


@pytest.fixture
def _own_registry() -> None:

    @register_policy_loss("batch_centred", scope="batch")
    def batch_centred(t):
        return -t.ratio() * (t.advantages - t.ratio().mean())


def context(item: RLLossContextInputItem, **options: Any) -> GRPOLossContext:
    cfg = GRPOLossConfig(**options)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    return GRPOLossContext(cfg, kwargs)


def loss_and_grads(item: RLLossContextInputItem, head: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    ctx = context(item, **options)
    loss, _ = ctx.forward(*head)
    leaves = [leaf for leaf in head if leaf.requires_grad]
    return [loss, *torch.autograd.grad(-1.3 * loss, leaves)]


def head_of(frozen: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    hidden, weight, bias = random_head(SHAPE, dtype=dtype)
    if frozen == "head":
        return hidden, weight.detach(), bias.detach()
    if frozen == "trunk":
        return hidden.detach(), weight, bias
    return hidden, weight, bias


@pytest.mark.usefixtures("_own_registry")
@pytest.mark.parametrize(("policy_loss", "dtype", "terms", "frozen"), combinations())
def test_every_loss_is_the_same_in_every_pass(policy_loss: str, frozen: str, terms: str, dtype: torch.dtype) -> None:
    item = random_item(SHAPE, dtype=dtype)
    # A loss that cancels to nearly 0 would have a relative error of the cancellation.
    item = item.replace(advantages=item.advantages + 0.8)
    options: dict[str, Any] = {"policy_loss_cfg": {"loss_type": policy_loss}}
    if terms == "kl":
        options |= {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.3}
    if terms == "entropy":
        options |= {"entropy_coef": 0.2}
    head = head_of(frozen, dtype)
    wide = tuple(leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in head)
    wide_item = RLLossContextInputItem(**{n: v.double() if v.is_floating_point() else v for n, v in item.tensors()})
    expected = loss_and_grads(wide_item, wide, **options)
    # Chunks of 1, chunks that cut sequences, chunks that hold one or two, and one for all; with and without budget.
    passes = set()
    for chunk_size, retain_bytes in ((1, 0), (5, 0), (5, 10**6), (9, 0), (18, 0), (100, 0), ("auto", 0)):
        chunked = {**options, "mode": "chunk", "chunk_size": chunk_size, "retain_bytes": retain_bytes}
        passes.add(context(item, **chunked).explain(*head).name)
        for ours, theirs in zip(loss_and_grads(item, head, **chunked), expected, strict=True):
            error = float((ours.detach().double() - theirs.detach()).norm() / theirs.detach().norm())
            # A product of ratios over a sequence adds up the rounding of all its tokens.
            single = 2e-6 if policy_loss in FULLY else 6e-6
            assert error < (1e-12 if dtype == torch.float64 else single), (chunk_size, retain_bytes, error)
    is_local = registry.policy_loss(policy_loss).scope == "token"
    names = {"one-pass"} if is_local else {"one-pass", "two-pass"}
    if frozen == "head":
        names = {"frozen"} if is_local or terms != "entropy" else {"frozen", "two-pass"}
    assert passes == names


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_cross_entropy_in_chunks(reduction: str) -> None:
    labels, head = random_item(SHAPE).shifted_labels, random_head(SHAPE)
    found = []
    for mode in ("eager", "chunk"):
        cfg = CELossConfig(loss_reduction=reduction, mode=mode, chunk_size=4)
        (kwargs,) = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
        loss, metrics = CELossContext(cfg, kwargs).forward(*head)
        found.append([loss, *torch.autograd.grad(loss, head), metrics["nll"].value()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_an_entropy_bonus_changes_the_gradient(mode: str) -> None:
    # REQ-18: the coefficient must matter, and by as much as the entropy's own gradient.
    item, head = random_item(SHAPE), random_head(SHAPE)
    plain = loss_and_grads(item, head, mode=mode, chunk_size=5)
    bonus = loss_and_grads(item, head, mode=mode, chunk_size=5, entropy_coef=0.5)
    active = item.shifted_labels != -100
    logprobs = (torch.nn.functional.linear(*head)).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)[active].mean()
    expected = torch.autograd.grad(entropy, head)
    torch.testing.assert_close(bonus[0] - plain[0], -0.5 * entropy, rtol=1e-10, atol=0)
    for with_bonus, without, grad in zip(bonus[1:], plain[1:], expected, strict=True):
        torch.testing.assert_close(with_bonus - without, -1.3 * -0.5 * grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_the_entropy_metric_changes_nothing_else(mode: str) -> None:
    item, head = random_item(SHAPE), random_head(SHAPE)
    plain = loss_and_grads(item, head, mode=mode, chunk_size=5)
    measured = loss_and_grads(item, head, mode=mode, chunk_size=5, use_entropy_metric=True)
    for ours, theirs in zip(measured, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-16)


def idle_rows(item: RLLossContextInputItem) -> RLLossContextInputItem:
    advantages = item.advantages.clone()
    advantages[1] = 0
    advantages[3, ::2] = 0
    return item.replace(advantages=advantages)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("policy_loss", ["vanilla", "cispo", "gspo"])
def test_dropping_tokens_without_advantage_leaves_loss_and_gradient_alone(policy_loss: str, mode: str) -> None:
    item, head = idle_rows(random_item(SHAPE)), random_head(SHAPE)
    options = {"policy_loss_cfg": {"loss_type": policy_loss}, "mode": mode, "chunk_size": 6}
    kept = loss_and_grads(item, head, **options)
    dropped = loss_and_grads(item, head, **options, drop_zero_advantage=True)
    for ours, theirs in zip(dropped, kept, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    scored = int((item.shifted_labels != -100).sum())
    idle = (item.shifted_labels != -100) & (item.advantages == 0)
    if policy_loss == "gspo":
        idle[3] = False  # half a sequence still counts in the mean of the other half
    _, metrics = context(item, **options, drop_zero_advantage=True).forward(*head)
    assert metrics["active_tokens"].value() == scored - int(idle.sum()) < scored


def test_dropping_respects_the_kl_term_and_the_bonus() -> None:
    item, head = idle_rows(random_item(SHAPE)), random_head(SHAPE)
    for other in ({"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.3}, {"entropy_coef": 0.2}):
        kept = loss_and_grads(item, head, **other, mode="chunk")
        dropped = loss_and_grads(item, head, **other, mode="chunk", drop_zero_advantage=True)
        for ours, theirs in zip(dropped, kept, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("_own_registry")
def test_dropping_is_refused_where_it_would_change_the_loss() -> None:
    @register_policy_loss("decayed")
    def decayed(t):
        return -t.logprobs * t.advantages + 0.1 * t.logprobs.square()

    for name in ("decayed", "batch_centred"):
        with pytest.raises(ConfigError, match=f"drop_zero_advantage=True would change policy loss '{name}'"):
            context(random_item(), policy_loss_cfg={"loss_type": name}, drop_zero_advantage=True)


@pytest.mark.usefixtures("_own_registry")
def test_a_loss_that_looks_further_than_it_declares_is_refused_before_the_first_forward() -> None:
    @register_policy_loss("sly")
    def sly(t):
        return -t.logprobs * (t.advantages - t.advantages.mean())

    for mode in ("eager", "chunk"):
        with pytest.raises(ConfigError, match=r"'sly' is registered with scope='token'.*scope='batch'"):
            context(random_item(), policy_loss_cfg={"loss_type": "sly"}, mode=mode)


def test_the_transforms_of_the_config_reach_both_modes() -> None:
    item, head = random_item(SHAPE), random_head(SHAPE)
    transforms = {"logit_scale": 0.7, "softcap": 1.5, "temperature": 0.8}
    eager = loss_and_grads(item, head, **transforms)
    assert abs(eager[0] - loss_and_grads(item, head)[0]) > 1e-3
    for ours, theirs in zip(loss_and_grads(item, head, **transforms, mode="chunk", chunk_size=4), eager, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_explain_names_the_general_path_of_a_loss_fn_of_ones_own() -> None:
    class Own(GRPOLossContext):
        def loss_fn(self, *args):
            loss, metrics = super().loss_fn(*args)
            return 2 * loss, metrics

    item, head = random_item(SHAPE), random_head(SHAPE)
    cfg = GRPOLossConfig(mode="chunk", chunk_size=5)
    (kwargs,) = Own.build_batches_loss_kwargs([item], cfg)
    plan = Own(cfg, kwargs).explain(*head)
    assert plan.name == "general"
    assert "Own computes its loss_fn from hidden states and head" in str(plan)
    doubled, _ = Own(cfg, kwargs).forward(*head)
    torch.testing.assert_close(doubled, 2 * GRPOLossContext(cfg, kwargs).forward(*head)[0], rtol=1e-12, atol=0)


def test_the_runner_explains_a_call() -> None:
    hidden, weight, _ = random_head((2, 8))
    runner = LossRunner.from_overrides(["mode=chunk", "loss.chunk_size=4"])
    plan = runner.explain(hidden, weight, input_ids=torch.randint(0, 11, (2, 8)), advantages=1.0)
    assert (plan.name, plan.tokens, len(plan.chunks)) == ("one-pass", 14, 4)
    assert (
        LossRunner(GRPOLossConfig())
        .explain(hidden, weight, input_ids=torch.randint(0, 11, (2, 8)), advantages=1.0)
        .name
        == "eager"
    )
    with pytest.raises(DataError, match="head_weight has shape"):
        runner.explain(hidden, weight[:, :3], input_ids=torch.randint(0, 11, (2, 8)), advantages=1.0)


def test_the_sign_does_not_flip_when_a_chunk_cuts_a_sequence() -> None:
    # A peer's chunk mode gives GSPO's loss -0.0496 whole and +0.0193 in chunks of 4.
    item, head = random_item((1, 13)), random_head((1, 13))
    whole = loss_and_grads(item, head, policy_loss_cfg={"loss_type": "gspo"})
    cut = loss_and_grads(item, head, policy_loss_cfg={"loss_type": "gspo"}, mode="chunk", chunk_size=4)
    assert abs(whole[0]) > 1e-3
    for ours, theirs in zip(cut, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("settings", "limit", "is_small"),
    [
        ({"chunk_size": 26}, 4 * 26 * 11, True),  # 2 rows of 13 positions, 11 entries
        ({"chunk_size": "auto"}, 4 * 26 * 11, True),
        ({"chunk_size": 25}, 4 * 26 * 11, False),  # two chunks
        ({"chunk_size": 26}, 4 * 26 * 11 - 1, False),
    ],
)
def test_small_logits_are_computed_at_once(
    settings: dict, limit: int, is_small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scored, "SMALL_LOGITS", limit)
    cfg, item, head = GRPOLossConfig(mode="chunk", **settings), random_item(), random_head()
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    context = GRPOLossContext(cfg, kwargs)
    plan = context.explain(*head)
    assert (plan.name == "eager") == is_small
    assert ("one chunk of at most" in str(plan)) == is_small
    calls = []

    def noting(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return fused_loss(*args, **options)

    monkeypatch.setattr(scored, "fused_loss", noting)
    loss, _ = context.forward(*head)
    assert (not calls) == is_small
    eager = GRPOLossContext(GRPOLossConfig(), kwargs).forward(*head)[0]
    torch.testing.assert_close(loss, eager, rtol=1e-12, atol=0)
