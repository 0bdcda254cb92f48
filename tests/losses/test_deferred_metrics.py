"""The metrics of a loss are computed when one is read, from values that nobody changes and that hold no graph."""

from __future__ import annotations

import gc
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import random_head, random_item
from toolkit import GRPOLossConfig, LossRunner, RLLossContextInputItem
from toolkit.functional.policy.registry import policy_loss_names
from toolkit.metrics import DeferredMetrics, Sum, deferred, merge_metrics, metrics_in, to_floats

CHUNKS = 1024, 3
"""All tokens at once, and in several chunks."""
WITH_ALL: dict[str, Any] = {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": 0.1, "use_entropy_metric": True}


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += 1
        return func(*args, **(kwargs or {}))


def run(cfg: GRPOLossConfig, hidden: Tensor | None = None) -> tuple[RLLossContextInputItem, Tensor, Any]:
    """Return an item of two packed sequences, its loss and its metrics; always the same."""
    torch.manual_seed(0)
    item = random_item((1, 13)).replace(group_ids=torch.zeros(1, 13, dtype=torch.int64))
    leaf, weight, bias = random_head((1, 13))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, [torch.tensor([0, 6, 13])])
    return item, *cfg.loss_ctx_cls(cfg, kwargs).forward(leaf if hidden is None else hidden, weight, bias)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", policy_loss_names())
def test_items_may_be_filled_anew_before_metrics_are_read(name: str, chunk_size: int) -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": name}, mode="chunk", chunk_size=chunk_size, **WITH_ALL)
    expected = to_floats(run(cfg)[2])
    item, _, metrics = run(cfg)
    for _, values in item.tensors():
        values.zero_()
    assert to_floats(metrics) == pytest.approx(expected, rel=0, abs=0, nan_ok=True)
    assert not all(map(math.isnan, expected.values()))


class Watched(torch.autograd.Function):
    """The identity; its node in the graph holds `owner`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, owner: Any) -> Tensor:
        ctx.owner = owner
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *gradients, None


class Owner:
    """An object that a node of the graph holds."""


@pytest.mark.parametrize("name", policy_loss_names())
def test_metrics_keep_no_graph(name: str) -> None:
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": name}, mode="eager", entropy_coef=0.1, **WITH_ALL)
    owner = Owner()
    is_alive = weakref.ref(owner)
    hidden = Watched.apply(torch.randn(1, 13, 5, dtype=torch.float64, requires_grad=True), owner)
    _, loss, metrics = run(cfg, hidden)
    del owner, hidden
    gc.collect()
    assert is_alive() is not None  # the loss holds the graph
    del loss
    gc.collect()
    assert is_alive() is None
    assert to_floats(metrics)["active_tokens"] > 0


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_metrics_that_nobody_reads_are_not_computed(chunk_size: int) -> None:
    item, _, metrics = run(GRPOLossConfig(mode="chunk", chunk_size=chunk_size))
    assert isinstance(metrics, DeferredMetrics)
    with Operations() as reading:
        assert float(metrics["active_tokens"]) == (item.shifted_labels != -100).sum()
    assert reading.number > 20
    with Operations() as again:
        assert metrics["ratio"] is metrics["ratio"]
    assert again.number == 0


def test_a_call_of_the_runner_defers_them_after_its_first() -> None:
    runner = LossRunner(GRPOLossConfig())
    item, head = random_item(), random_head()
    fields = {name: values for name, values in item.tensors() if name != "ref_logprobs"}
    names = runner(*head, **fields).metrics.keys()
    result = runner(*head, **fields)
    with Operations() as reading:
        assert result.metrics.keys() == names
    assert reading.number > 20


def test_it_is_a_mapping_that_is_copied_and_pickled_as_a_dict() -> None:
    calls: list[int] = []

    def measured() -> dict[str, Sum]:
        calls.append(1)
        return {"a": Sum(torch.tensor(2.0))}

    metrics = DeferredMetrics(measured)
    assert metrics_in(metrics) is metrics
    merged = DeferredMetrics(lambda: merge_metrics([metrics, metrics]))
    assert not calls
    assert to_floats(merged) == {"a": 4.0}
    assert to_floats(metrics | {"b": Sum(torch.tensor(1.0))}) == {"a": 2.0, "b": 1.0}
    loaded = pickle.loads(pickle.dumps(metrics))
    assert type(loaded) is dict
    assert to_floats(loaded) == {"a": 2.0}
    assert len(calls) == 1


def test_metrics_of_a_dtensor_are_computed_at_once() -> None:
    class Sharded:
        def full_tensor(self) -> Tensor:  # what tells a DTensor
            raise AssertionError

    assert type(deferred(dict, Sharded())) is dict  # type: ignore[arg-type]
    assert type(deferred(dict, torch.zeros(1))) is DeferredMetrics
