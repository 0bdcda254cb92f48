"""A mixture of experts keeps its own router loss, at the same scale on one process and on two (R5)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from torch import Tensor

from tests.models.test_policy import build
from tests.processes import run_processes
from tests.test_sharded import gradients
from toolkit import CELossConfig, CELossContextInputItem
from toolkit.losses import auxiliary_weights
from toolkit.models.policy import Policy
from toolkit.testing.evaluation import alone
from toolkit.training.sharding import accumulating, prepare_policy

CFG = CELossConfig(mode="chunk", chunk_size=4)
COEFFICIENT = 3.0


def mixtral(coefficient: float) -> Policy:
    return Policy(build("mixtral", output_router_logits=True, router_aux_loss_coef=coefficient)).train()


def backward(policy: Any, rows: list[Tensor], *, weight: float | None = None) -> None:
    context = CFG.loss_ctx_cls
    batches = context.build_batches_loss_kwargs(
        [CELossContextInputItem(shifted_labels=own[:, 1:]) for own in rows], CFG
    )
    weights = auxiliary_weights([own[:, :-1].numel() for own in rows])
    for index, (own, kwargs, factor) in enumerate(zip(rows, batches, weights, strict=True)):
        with accumulating(policy, is_last=index == len(rows) - 1):
            chosen = factor if weight is None else weight
            loss, _ = policy(own, torch.ones_like(own), context(CFG, kwargs), auxiliary_weight=chosen)
            loss.backward()


def two_micro_batches_on_each_rank(rank: int, world: int) -> None:
    """The same row four times: a mean over tokens, so that the gradient is that of the row."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    row = torch.randint(2, 40, (1, 6), generator=torch.Generator().manual_seed(1))
    with alone():
        once, without = mixtral(COEFFICIENT), mixtral(0.0)
        backward(once, [row])
        backward(without, [row])
    expected, plain = gradients(once), gradients(without)
    routers = [name for name in expected if name.endswith("gate.weight")]
    assert routers
    assert all(off(expected[name], plain[name]) > 0.1 for name in routers)
    for sharding in ("none", "fsdp2"):
        policy = prepare_policy(mixtral(COEFFICIENT), accelerator, sharding)  # type: ignore[arg-type]
        backward(policy, [row, row])
        found = gradients(policy)
        assert max(off(found[name], expected[name]) for name in expected) < 1e-5
    naive = prepare_policy(mixtral(COEFFICIENT), accelerator)
    backward(naive, [row, row], weight=float(world))  # the bug: it grows with micro-batches and world
    assert all(off(gradients(naive)[name], expected[name]) > 0.1 for name in routers)


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-9))


@pytest.mark.slow
@pytest.mark.dist
def test_the_router_loss_does_not_grow_with_the_world() -> None:
    run_processes(2, two_micro_batches_on_each_rank)
