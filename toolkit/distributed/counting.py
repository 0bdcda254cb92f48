"""Which ranks a step is counted over. R ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch.distributed as dist

_counted: ContextVar[Any] = ContextVar("counted", default=None)
"""The process group of `counting_over`, of each thread; None: all ranks."""


@contextlib.contextmanager
def counting_over(group: Any) -> Iterator[None]:
    """Count steps and reduce metrics over the ranks of `group` instead of all ranks.

    Use it where several ranks process the same tokens, such as those that share a vocabulary: each would count them
    again. Pass the process group of ranks with different tokens, over which the back-end averages gradients; ranks that
    share a sequence belong to it::

        mesh = init_device_mesh("cuda", (dp, tp), mesh_dim_names=("dp", "tp"))
        with counting_over(mesh["dp"].get_group()):
            ...  # build_batches_loss_kwargs, forward, LossRunner.step, reduce_metrics
    """
    token = _counted.set(group)
    try:
        yield
    finally:
        _counted.reset(token)


def counted_group() -> Any:
    """Return the group of the `counting_over` around this call; None: all ranks."""
    return _counted.get()


def counting_as_before(group: Any) -> contextlib.AbstractContextManager[None]:
    """Count over `group`, unless a `counting_over` is in force or `group` is None.

    For what was begun inside it and goes on elsewhere: autograd computes a checkpointed region again in another
    thread, which does not see the caller's `counting_over`.
    """
    return contextlib.nullcontext() if group is None or _counted.get() is not None else counting_over(group)


def world_size() -> int:
    """Return the number of ranks (of `counting_over`), 1 without a process group."""
    return dist.get_world_size(_counted.get()) if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process (in `counting_over`), 0 without a process group."""
    return dist.get_rank(_counted.get()) if dist.is_available() and dist.is_initialized() else 0


def counted_with(group: Any) -> int:
    """Return how many ranks of `group` are counted, including this one."""
    members = dist.get_process_group_ranks(group)
    among = _counted.get()
    counted = range(dist.get_world_size()) if among is None else dist.get_process_group_ranks(among)
    return len(set(members) & set(counted))


def rank_of(global_rank: int) -> int:
    """Return the rank among the counted ranks of the process with rank `global_rank` among all."""
    group = _counted.get()
    return global_rank if group is None else dist.get_group_rank(group, global_rank)
