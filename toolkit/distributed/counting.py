"""Which ranks a step is counted over. R ranks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch.distributed as dist

from toolkit.errors import ConfigError


class Counted(NamedTuple):
    """The arguments of a `counting_over`."""

    group: Any
    divisor: int | None


_counted: ContextVar[Counted | None] = ContextVar("counted", default=None)
"""Of the innermost `counting_over`, of each thread; None: all ranks."""


@contextlib.contextmanager
def counting_over(group: Any, *, divisor: int | None = None) -> Iterator[None]:
    """Count steps and reduce metrics over the ranks of `group` instead of all ranks.

    Use it where several ranks process the same tokens, such as those that share a vocabulary: each would count them
    again. Pass the process group of ranks with different tokens, over which the back-end averages gradients; ranks that
    share a sequence belong to it::

        mesh = init_device_mesh("cuda", (dp, tp), mesh_dim_names=("dp", "tp"))
        with counting_over(mesh["dp"].get_group()):
            ...  # build_batches_loss_kwargs, forward, LossRunner.step, reduce_metrics

    Args:
        group: the process group; None: all ranks.
        divisor: what the back-end divides the sum of the ranks' gradients by, where that is not the number of ranks in
            `group`: DeepSpeed sums over ranks that share a sequence and averages over the others.

    Raises:
        ConfigError: `divisor` is less than 1.
    """
    if divisor is not None and divisor < 1:
        raise ConfigError(f"divisor={divisor!r} of counting_over must be at least 1; omit it for the number of ranks")
    token = _counted.set(Counted(group, divisor))
    try:
        yield
    finally:
        _counted.reset(token)


def counted_over() -> Counted | None:
    """Return what the `counting_over` around this call was given; None: there is none."""
    return _counted.get()


def counting_as_before(counted: Counted | None) -> contextlib.AbstractContextManager[None]:
    """Count as `counted_over` returned, unless a `counting_over` is in force or `counted` is None.

    For what was begun inside it and goes on elsewhere: autograd computes a checkpointed region again in another
    thread, which does not see the caller's `counting_over`.
    """
    if counted is None or _counted.get() is not None:
        return contextlib.nullcontext()
    return counting_over(counted.group, divisor=counted.divisor)


def counted_group() -> Any:
    """Return the group of the `counting_over` around this call; None: all ranks."""
    counted = _counted.get()
    return None if counted is None else counted.group


def world_size() -> int:
    """Return the number of ranks (of `counting_over`), 1 without a process group."""
    return dist.get_world_size(counted_group()) if dist.is_available() and dist.is_initialized() else 1


def gradient_divisor() -> int:
    """Return what the back-end divides the sum of the ranks' gradients by, if it averages: the number of ranks.

    `counting_over` may say otherwise.
    """
    counted = _counted.get()
    return world_size() if counted is None or counted.divisor is None else counted.divisor


def rank() -> int:
    """Return the rank of this process (in `counting_over`), 0 without a process group."""
    return dist.get_rank(counted_group()) if dist.is_available() and dist.is_initialized() else 0


def counted_with(group: Any) -> int:
    """Return how many ranks of `group` are counted, including this one."""
    members = dist.get_process_group_ranks(group)
    among = counted_group()
    counted = range(dist.get_world_size()) if among is None else dist.get_process_group_ranks(among)
    return len(set(members) & set(counted))


def rank_of(global_rank: int) -> int:
    """Return the rank among the counted ranks of the process with rank `global_rank` among all."""
    group = counted_group()
    return global_rank if group is None else dist.get_group_rank(group, global_rank)
