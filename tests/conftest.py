"""Fixtures shared by all tests: seeds, small batches, one thread for each of the processes that run tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable
from typing import Any

# Before torch is loaded: two workers with two threads each would wait for each other on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor

import toolkit.losses.scored
import toolkit.testing.processes
from toolkit import RLLossContextInputItem

toolkit.testing.processes.START_METHOD = "forkserver"  # as in tests.processes
toolkit.losses.scored.SMALL_LOGITS = 0  # the batches of tests are small, and chunk mode is to take its own path


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def slow_unless(is_fast: Callable[[int, Any], bool], values: Iterable[Any]) -> list[Any]:
    """Return the values of a parameter; those for which ``is_fast(index, value)`` does not hold run with -m slow."""
    return [
        value if is_fast(index, value) else pytest.param(value, marks=pytest.mark.slow)
        for index, value in enumerate(values)
    ]


def random_labels(shape: tuple[int, ...], vocabulary: int, ignored: float = 0.4) -> Tensor:
    labels = torch.randint(0, vocabulary, shape)
    return labels.masked_fill(torch.rand(shape) < ignored, -100)


def random_item(
    shape: tuple[int, int] = (2, 13), vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> RLLossContextInputItem:
    """An item whose ratios are far enough from 1 that clipping binds on some tokens."""
    return RLLossContextInputItem(
        shifted_labels=random_labels(shape, vocabulary),
        advantages=torch.randn(shape, dtype=dtype),
        old_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        ref_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        rollout_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        teacher_logprobs=(-2.4 + 0.5 * torch.randn(shape, dtype=dtype)).clamp(max=0),
        group_ids=(torch.arange(shape[0]) // 2).unsqueeze(-1),
    )


def random_head(
    shape: tuple[int, int] = (2, 13), width: int = 5, vocabulary: int = 11, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias, all leaves that ask for a gradient."""
    hidden = torch.randn(*shape, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, requires_grad=True)
    bias = torch.randn(vocabulary, dtype=dtype, requires_grad=True)
    return hidden, weight, bias


def pytest_collection_finish() -> None:
    """Spare the garbage collector the millions of objects of torch and Hydra that never go."""
    gc.collect()
    gc.freeze()
