"""Sums over ranks, sequence-parallel split and gather, and a check of the number of processes.

Legend: R ranks (of the mesh, where one is passed), T positions, t positions of a shard, [...] any shape. Everything
here also works in one process without a process group.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import DataError, LaunchError
from toolkit.metrics import M, Metric, Metrics, fetch, packed

T = TypeVar("T")

STARTED_TOGETHER = (
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)
"""Environment variables in which torchrun, MPI and srun give the number of processes that they started."""
PACKET = 128
"""Numbers per rank in the first collective of `reduce_metrics`, two of them not values; more need a second one."""

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


def all_gather_objects(value: T) -> list[T]:
    """Return the (small, picklable) `value` of every rank, in rank order; all ranks must call it together."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=_counted.get())
    return gathered


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` [...] over all ranks as a new tensor; every rank must call it."""
    if world_size() == 1:
        return values.detach().clone()
    total = values.detach().to(collective_device(), copy=True)
    dist.all_reduce(total, group=_counted.get())
    return total.to(values.device)


def reduce_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Merge metrics over all ranks; all must call it together and get the same numbers to the last bit.

    One collective and one transfer to the host, where the result stays. The values of every rank are gathered, with a
    checksum of their names and kinds, and combined there. That moves 1 KiB a rank. All-reduces would move less among
    many ranks, but need two for sums and extremes, lose a NaN in the latter, and merge by position what ranks measured
    under different names. If the checksums differ (a rank has a metric that another lacks), everything is sent again
    with its names, and a name that is absent on a rank adds nothing.

    Raises:
        DataError: two ranks measured different kinds of metric under one name; raised on all ranks.
    """
    if world_size() == 1:
        return dict(metrics)
    names = sorted(metrics)
    values = packed([part for name in names for part in metrics[name].parts], collective_device())
    checksum = zlib.crc32(repr([(name, type(metrics[name]).__name__) for name in names]).encode())
    everyone = all_gather_ragged(F.pad(values, [1, 0], value=checksum), room=PACKET - 1)
    if any(row[0] != checksum for row in everyone):
        return _reduced_by_name({name: (type(metrics[name]), fetch(metrics[name].parts)) for name in names})
    columns = torch.stack(everyone)[:, 1:].split([len(metrics[name].parts) for name in names], 1)
    merged = {name: _over_ranks(type(metrics[name]), numbers) for name, numbers in zip(names, columns, strict=True)}
    return {name: merged[name] for name in metrics}


def all_gather_ragged(vector: Tensor, *, room: int) -> list[Tensor]:
    """Return the vectors of all ranks, on the host, in rank order; all ranks must call it together.

    One collective, and a second one only if a vector is longer than `room`.

    Args:
        vector: [n], of any length.
        room: elements that the first collective carries, the same on every rank.
    """
    if world_size() == 1:
        return [vector.cpu()]
    vector = vector.to(collective_device())
    length = vector.new_full((1,), len(vector))
    everyone = _gathered(F.pad(torch.cat([length, vector[:room]]), [0, max(0, room - len(vector))]))
    most = int(everyone[:, 0].max())
    if most > room:
        more = F.pad(vector[room:], [0, most - room - len(vector[room:])])
        everyone = torch.cat([everyone, _gathered(more)], 1)
    return [row[1 : 1 + int(row[0])] for row in everyone]


def _gathered(vector: Tensor) -> Tensor:
    """Return the vectors [n] of all ranks on the host, [R, n]."""
    gathered = vector.new_empty(world_size() * len(vector))
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    gather(gathered, vector.contiguous(), group=_counted.get())
    return gathered.view(world_size(), -1).cpu()


def _over_ranks(kind: type[M], numbers: Tensor) -> M:
    """Return the metric whose fields on R ranks are `numbers`, [R, fields]."""
    if kind.how == "sum":
        return kind.of_parts(numbers.sum(0).unbind())
    return kind.of_parts((numbers.amin(0) if kind.how == "min" else numbers.amax(0)).unbind())


def _reduced_by_name(metrics: dict[str, tuple[type[Metric], list[float]]]) -> dict[str, Metric]:
    everyone = all_gather_objects(metrics)
    merged: dict[str, Metric] = {}
    for name in {name: None for measured in everyone for name in measured}:
        holders = {index: measured[name] for index, measured in enumerate(everyone) if name in measured}
        kinds = {kind.__name__: index for index, (kind, _) in holders.items()}
        if len(kinds) > 1:
            listed_kinds = " and ".join(f"a {kind} on rank {index}" for kind, index in sorted(kinds.items()))
            raise DataError(f"the metric {name!r} is {listed_kinds}; report it as the same kind on every rank")
        ((kind, _), *_) = holders.values()
        numbers = torch.tensor([parts for _, parts in holders.values()], dtype=torch.float64)
        merged[name] = _over_ranks(kind, numbers)
    return merged


def collective_device() -> torch.device:
    """Return the device whose tensors the back-end accepts: NCCL takes none from the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sp_split(values: Tensor, sp_mesh: DeviceMesh, *, dim: int = -1, pad: float) -> Tensor:
    """Return this rank's shard [..., t, ...] of `values` along `dim`, padded so every rank gets the same length.

    Args:
        values: [..., T, ...] the full tensor, the same on every rank of the mesh.
        sp_mesh: one-dimensional mesh of the ranks that share a sequence.
        dim: the token axis.
        pad: value that fills the end when the length is not divisible by the size of the mesh.
    """
    size = sp_mesh.size()
    length = values.shape[dim]
    missing = -length % size
    if missing:
        trailing = values.dim() - 1 - (dim % values.dim())
        values = F.pad(values, [0, 0] * trailing + [0, missing], value=pad)
    return values.chunk(size, dim=dim)[sp_mesh.get_local_rank()].contiguous()


def sp_gather(shard: Tensor, sp_mesh: DeviceMesh, *, dim: int = -1) -> Tensor:
    """Return all shards joined, [..., R t, ...] with the padding of `sp_split`; every rank of the mesh must call it.

    Differentiable: where every rank computes a part of the loss from the full tensor, the gradient of a shard is the
    sum of its gradients on all ranks. That takes a second collective, in backward.

    Args:
        shard: [..., t, ...] this rank's shard, of the same shape on every rank.
        sp_mesh: one-dimensional mesh of the ranks that share a sequence.
        dim: the token axis.
    """
    return _SPGather.apply(shard, sp_mesh, dim)


class _SPGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, sp_mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.sp_mesh, ctx.dim, ctx.length = sp_mesh, dim, shard.shape[dim]
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(sp_mesh.size())]
        dist.all_gather(shards, shard.contiguous(), group=sp_mesh.get_group())
        return torch.cat(shards, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.sp_mesh.get_group())
        return total.narrow(ctx.dim, ctx.sp_mesh.get_local_rank() * ctx.length, ctx.length), None, None


def check_world_size(obtained: int, expected: int | None = None) -> None:
    """Raise if fewer or more processes work together than were asked for.

    Without this check ``accelerate launch --cpu --num_processes 2`` trains in one process, and two processes that did
    not connect train two models, both without a warning (huggingface/accelerate#2741).

    Args:
        obtained: processes in the group, as accelerate sees them.
        expected: the number in the configuration; None checks only the launcher's.

    Raises:
        LaunchError: the numbers differ.
    """
    asked = [
        ("training.num_processes", expected),
        ("WORLD_SIZE", _as_int(os.environ.get("WORLD_SIZE"))),
        ("the launcher's --num_processes", _asked_by_launcher()),
    ]
    # Lower bounds: these count the processes of one machine or of one launcher, and there may be several.
    at_least = [(name, _as_int(os.environ.get(name))) for name in STARTED_TOGETHER]
    highest = [(name, _as_int(os.environ.get(name))) for name in ("RANK", "LOCAL_RANK")]
    at_least += [(f"{name}={number}", number + 1) for name, number in highest if number is not None]
    for source, number in asked + [(source, number) for source, number in at_least if (number or 0) > obtained]:
        if number is not None and number != obtained:
            raise LaunchError(
                f"{source} asks for {number} processes, but {obtained} work together; on a machine without GPUs use "
                "'ACCELERATE_USE_CPU=1 accelerate launch --multi_gpu --num_processes N -m toolkit.train' or "
                "'torchrun --nproc_per_node N -m toolkit.train'"
            )


def _as_int(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _asked_by_launcher() -> int | None:
    """Read --num_processes from the command line of the parent, when that is ``accelerate launch``.

    Its CPU path starts one process and does not pass the number on; only the parent's command line shows it.
    """
    try:
        import psutil  # comes with accelerate

        arguments = psutil.Process().parent().cmdline()
    except Exception:  # no such process, no permission, no psutil: nothing to compare with
        return None
    start = next((index for index, argument in enumerate(arguments) if "accelerate" in argument), None)
    if start is None or not any("launch" in argument for argument in arguments[start : start + 2]):
        return None
    launcher_arguments = arguments[start + 1 :]
    for index, argument in enumerate(launcher_arguments):
        flag, _, value = argument.replace("-", "_").partition("=")
        if flag == "__num_processes":
            return _as_int(value or next(iter(launcher_arguments[index + 1 :]), None))
        if argument in ("-m", "--module") or argument.endswith(".py"):
            return None  # what follows belongs to the script
    return None
