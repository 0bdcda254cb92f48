"""Fixtures shared by all tests: seeds, small batches, and a runner for several processes."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

from toolkit import RLLossContextInputItem


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
        old_logprobs=-2.4 + 0.5 * torch.randn(shape, dtype=dtype),
        ref_logprobs=-2.4 + 0.5 * torch.randn(shape, dtype=dtype),
        rollout_logprobs=-2.4 + 0.5 * torch.randn(shape, dtype=dtype),
        teacher_logprobs=-2.4 + 0.5 * torch.randn(shape, dtype=dtype),
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


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _entry(rank: int, world: int, port: int, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    try:
        function(rank, world, *args)
    finally:
        torch.distributed.destroy_process_group()


def run_processes(world: int, function: Callable[..., None], *args: Any) -> None:
    """Run ``function(rank, world, *args)`` in `world` processes joined by gloo; an assertion in one fails the test."""
    mp.spawn(_entry, args=(world, free_port(), function, args), nprocs=world)
