"""Sums over ranks and gathered values, also without a process group. R ranks, [...] any shape."""

from __future__ import annotations

import zlib
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from toolkit.distributed.counting import counted_group, world_size
from toolkit.errors import DataError
from toolkit.metrics import M, Metric, Metrics, fetch, packed

T = TypeVar("T")

PACKET = 128
"""Numbers per rank in the first collective of `reduce_metrics`, two of them not values; more need a second one."""


def all_gather_objects(value: T) -> list[T]:
    """Return the (small, picklable) `value` of every rank, in rank order; all ranks must call it together."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value, group=counted_group())
    return gathered


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` [...] over all ranks as a new tensor; every rank must call it."""
    if world_size() == 1:
        return values.detach().clone()
    total = values.detach().to(collective_device(), copy=True)
    dist.all_reduce(total, group=counted_group())
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
    gather(gathered, vector.contiguous(), group=counted_group())
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
