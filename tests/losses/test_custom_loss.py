"""Losses of one's own: the interface's three-subclass skeleton filled in, and one registered function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tests.conftest import random_head, random_item
from toolkit import (
    BaseLossConfig,
    BaseLossContext,
    BaseLossKwargs,
    DataError,
    GRPOLossConfig,
    LossRunner,
    RLLossContextInputItem,
    register_policy_loss,
)
from toolkit.functional import registry


class FocalLossConfig(BaseLossConfig):
    """Focal loss weighted by advantages: ``A (1 - p)^gamma (-log p)``; its gradient goes through the logits."""

    gamma: float = 2.0

    @property
    def loss_ctx_cls(self) -> type[FocalLossContext]:
        return FocalLossContext


class FocalLossKwargs(BaseLossKwargs):
    shifted_labels: torch.Tensor
    loss_weight: torch.Tensor
    gamma: Any


class FocalLossContext(BaseLossContext[RLLossContextInputItem]):
    loss_cfg: FocalLossConfig
    loss_kwargs: FocalLossKwargs

    @classmethod
    def build_batches_loss_kwargs(
        cls,
        data_batches: list[RLLossContextInputItem],
        loss_cfg: FocalLossConfig,
        cu_seq_lens_list: list[torch.Tensor] | None = None,
        sp_mesh: DeviceMesh | None = None,
    ) -> list[FocalLossKwargs]:
        tokens = sum(int((item.shifted_labels != loss_cfg.ignore_idx).sum()) for item in data_batches)
        return [
            FocalLossKwargs(
                shifted_labels=item.shifted_labels, loss_weight=item.advantages / tokens, gamma=loss_cfg.gamma
            )
            for item in data_batches
        ]

    def loss_fn(
        self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: FocalLossKwargs
    ) -> tuple[Tensor, Tensor | None]:
        labels = loss_kwargs.shifted_labels
        logits = F.linear(hidden_states, head_weight, head_bias)
        logprobs = -F.cross_entropy(logits.flatten(0, -2), labels.flatten().clamp(min=0), reduction="none")
        token_losses = (1 - logprobs.exp()) ** loss_kwargs.gamma * -logprobs
        weights = (loss_kwargs.loss_weight * (labels != self.loss_cfg.ignore_idx)).flatten()
        return (weights * token_losses).sum(), logits


def focal(mode: str, chunk_size: int = 4) -> tuple[Tensor, Any, list[Tensor]]:
    torch.manual_seed(1)
    item, (hidden, weight, bias) = random_item(), random_head()
    cfg = FocalLossConfig(gamma=1.5, mode=mode, chunk_size=chunk_size)
    (kwargs,) = FocalLossContext.build_batches_loss_kwargs([item], cfg)
    loss, extra = FocalLossContext(cfg, kwargs).forward(hidden, weight, bias)
    return loss, extra, list(torch.autograd.grad(-1.7 * loss, (hidden, weight, bias)))


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 13, 100])
def test_skeleton_in_both_modes(chunk_size: int) -> None:
    eager, logits, eager_grads = focal("eager")
    chunked, extra, chunked_grads = focal("chunk", chunk_size)
    assert logits.shape == (2, 13, 11)
    assert extra is None  # the logits of a chunk are not kept
    assert abs(eager.item()) > 1e-3
    torch.testing.assert_close(chunked, eager, rtol=1e-12, atol=0)
    for ours, theirs in zip(chunked_grads, eager_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_a_tensor_of_unknown_layout_is_refused_by_name() -> None:
    class Kwargs(BaseLossKwargs):
        temperatures: torch.Tensor

    kwargs = Kwargs(shifted_labels=torch.zeros(1, 4, dtype=torch.int64), temperatures=torch.ones(1, 4))
    with pytest.raises(DataError, match=r"Kwargs\.temperatures .* PerToken"):
        kwargs.chunk(2)


@pytest.fixture
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.policy_loss_names()
    monkeypatch.setattr(registry.POLICY_LOSSES, "entries", dict(registry.POLICY_LOSSES.entries))


@pytest.mark.usefixtures("_own_registry")
def test_one_function_is_a_loss() -> None:
    @register_policy_loss("my_ppo")
    def my_ppo(t, *, eps: float = 0.2):
        r = t.ratio()
        return -torch.minimum(r * t.advantages, r.clamp(1 - eps, 1 + eps) * t.advantages)

    item, head = random_item(), random_head()
    fields = dict(item.tensors())
    mine = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "my_ppo", "eps": 0.3}))(*head, **fields)
    vanilla = {"loss_type": "vanilla", "cliprange_low": 0.3, "cliprange_high": 0.3, "clip_ratio_c": None}
    builtin = LossRunner(GRPOLossConfig(policy_loss_cfg=vanilla))(*head, **fields)
    torch.testing.assert_close(mine.loss, builtin.loss, rtol=1e-12, atol=0)


@pytest.mark.usefixtures("_own_registry")
def test_sequence_statistics_need_the_scope_to_say_so() -> None:
    def centred(t):
        return -t.logprobs * (t.advantages - t.segment_mean(t.advantages))

    register_policy_loss("centred_token")(centred)
    register_policy_loss("centred", scope="sequence", overwrite=True)(centred)
    item, head = random_item(), random_head()
    fields = dict(item.tensors())
    with pytest.raises(ValueError, match="scope='sequence'"):
        LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "centred_token"}))(*head, **fields)
    eager = LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "centred"}))(*head, **fields).loss
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "centred"}, mode="chunk", chunk_size=3)
    chunked = LossRunner(cfg)(*head, **fields).loss
    torch.testing.assert_close(chunked, eager, rtol=1e-12, atol=1e-15)


@pytest.mark.usefixtures("_own_registry")
def test_a_loss_that_averages_is_refused() -> None:
    @register_policy_loss("averaged")
    def averaged(t):
        return (t.logprobs * t.advantages).mean()

    with pytest.raises(DataError, match="without a mean"):
        LossRunner(GRPOLossConfig(policy_loss_cfg={"loss_type": "averaged"}))(
            *random_head(), **dict(random_item().tensors())
        )
