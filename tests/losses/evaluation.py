"""A loss through its context, over micro-batches, and what two such runs must share."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from toolkit import RLLossContextInputItem

Outcome = tuple[Tensor, list[Tensor], dict[str, float]]
"""Loss, gradients of all hidden states, weight and bias, and metrics."""


def evaluate(
    cfg: Any, items: list[RLLossContextInputItem], heads: list[tuple], bounds: list[Tensor] | None = None
) -> Outcome:
    """Run the context of `cfg` over micro-batches that share the weight and bias of the first head."""
    context = cfg.loss_ctx_cls
    weight, bias = heads[0][1:]
    batches = context.build_batches_loss_kwargs(items, cfg, bounds)
    total, metrics = torch.zeros((), dtype=torch.float64), {}
    for (hidden, _, _), kwargs in zip(heads, batches, strict=True):
        loss, found = context(cfg, kwargs).forward(hidden, weight, bias)
        total = total + loss
        for name, metric in found.items():
            metrics[name] = metrics[name].merge(metric) if name in metrics else metric
    grads = torch.autograd.grad(total, [*[head[0] for head in heads], weight, bias])
    return total.detach(), list(grads), {name: metric.value() for name, metric in metrics.items()}


def assert_same(ours: Outcome, theirs: Outcome) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-12, atol=0)
    for own, other in zip(ours[1], theirs[1], strict=True):
        assert other.abs().max() > 1e-4
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-15)
    assert ours[2] == pytest.approx(theirs[2], rel=1e-12)


def cut(
    whole: RLLossContextInputItem, hidden: Tensor, lengths: list[int]
) -> tuple[list[RLLossContextInputItem], list[Tensor]]:
    """Cut the rows of a batch and their hidden states, which become leaves."""
    parts = [
        RLLossContextInputItem(**{name: value[start:stop] for name, value in whole.tensors()})
        for start, stop in pairwise([0, *accumulate(lengths)])
    ]
    return parts, [part.detach().requires_grad_() for part in hidden.split(lengths)]
