"""Sums over ranks, sequence-parallel split and gather, and the check that as many processes run as were asked for.

R ranks. Everything here also works in one process without a process group.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import LaunchError
from toolkit.metrics import EffectiveSampleSize, Max, Mean, Metric, Metrics, Min, Sum

T = TypeVar("T")


def world_size() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, 0 outside of torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def all_gather_objects(own: T) -> list[T]:
    """Return the (small, picklable) object of every rank, in the order of the ranks; all must call it together."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, own)
    return found


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of `values` over all ranks as a new tensor; every rank must call it."""
    if world_size() == 1:
        return values.detach().clone()
    total = values.detach().to(_collective_device(), copy=True)
    dist.all_reduce(total)
    return total.to(values.device)


def reduce_metrics(metrics: Metrics) -> dict[str, Metric]:
    """Merge metrics over all ranks with three collectives; every rank must have the same names in the same order."""
    if world_size() == 1 or not metrics:
        return dict(metrics)
    sums = [m.total for m in metrics.values() if isinstance(m, Sum)]
    sums += [part for m in metrics.values() if isinstance(m, Mean) for part in (m.num, m.den)]
    sizes = [m for m in metrics.values() if isinstance(m, EffectiveSampleSize)]
    sums += [part for m in sizes for part in (m.total, m.squares, m.count)]
    smallest = [m.smallest for m in metrics.values() if isinstance(m, Min)]
    largest = [m.largest for m in metrics.values() if isinstance(m, Max)]
    total, low, high = (
        iter(_reduced(parts, op))
        for parts, op in ((sums, dist.ReduceOp.SUM), (smallest, dist.ReduceOp.MIN), (largest, dist.ReduceOp.MAX))
    )
    # `sums` holds all Sum totals before the parts of the means and then of the sizes: read back in three rounds.
    whole: dict[str, Metric] = {name: Sum(next(total)) for name, m in metrics.items() if isinstance(m, Sum)}
    whole |= {name: Mean(next(total), next(total)) for name, m in metrics.items() if isinstance(m, Mean)}
    whole |= {
        name: EffectiveSampleSize(next(total), next(total), next(total))
        for name, m in metrics.items()
        if isinstance(m, EffectiveSampleSize)
    }
    whole |= {name: Min(next(low)) for name, m in metrics.items() if isinstance(m, Min)}
    whole |= {name: Max(next(high)) for name, m in metrics.items() if isinstance(m, Max)}
    return {name: whole[name] for name in metrics}


def _reduced(parts: list[Tensor], op: dist.ReduceOp.RedOpType) -> list[Tensor]:
    if not parts:
        return []
    device = _collective_device()
    packed = torch.stack([part.detach().to(device=device, dtype=torch.float64) for part in parts])
    dist.all_reduce(packed, op=op)
    return list(packed.unbind())


def _collective_device() -> torch.device:
    """Return where the back-end wants its tensors: NCCL takes none from the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def sp_split(values: Tensor, sp_mesh: DeviceMesh, *, dim: int = -1, pad: float) -> Tensor:
    """Return this rank's shard of `values` along `dim`, padded so that every rank gets the same length.

    Args:
        values: the whole tensor, the same on every rank of the mesh.
        sp_mesh: one-dimensional mesh of the ranks that share a sequence.
        dim: the token axis.
        pad: what fills the end when the length is not divisible by the mesh.
    """
    size = sp_mesh.size()
    length = values.shape[dim]
    missing = -length % size
    if missing:
        trailing = values.dim() - 1 - (dim % values.dim())
        values = F.pad(values, [0, 0] * trailing + [0, missing], value=pad)
    return values.chunk(size, dim=dim)[sp_mesh.get_local_rank()].contiguous()


def sp_gather(shard: Tensor, sp_mesh: DeviceMesh, *, dim: int = -1) -> Tensor:
    """Return all shards joined along `dim` (padding of `sp_split` included), without gradient."""
    shards = [torch.empty_like(shard) for _ in range(sp_mesh.size())]
    dist.all_gather(shards, shard.detach().contiguous(), group=sp_mesh.get_group())
    return torch.cat(shards, dim=dim)


def check_world_size(obtained: int, expected: int | None = None) -> None:
    """Stop when fewer or more processes work together than were asked for.

    Without this check ``accelerate launch --cpu --num_processes 2`` trains in one process, and two processes that did
    not find each other train two models; neither says a word (huggingface/accelerate#2741).

    Args:
        obtained: processes in the group, as accelerate sees them.
        expected: what the configuration asks for; None asks for nothing beyond what the launcher says.

    Raises:
        LaunchError: the numbers differ.
    """
    asked = [
        ("training.num_processes", expected),
        ("WORLD_SIZE", _as_int(os.environ.get("WORLD_SIZE"))),
        ("the launcher's --num_processes", _asked_by_launcher()),
    ]
    for source, number in asked:
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

    Its CPU path starts one process and passes nothing on, so the parent's own words are the only trace.
    """
    try:
        import psutil  # comes with accelerate

        words = psutil.Process().parent().cmdline()
    except Exception:  # no such process, no permission, no psutil: then there is nothing to compare with
        return None
    start = next((index for index, word in enumerate(words) if "accelerate" in word), None)
    if start is None or not any("launch" in word for word in words[start : start + 2]):
        return None
    own = words[start + 1 :]
    for index, word in enumerate(own):
        flag, _, value = word.replace("-", "_").partition("=")
        if flag == "__num_processes":
            return _as_int(value or next(iter(own[index + 1 :]), None))
        if word in ("-m", "--module") or word.endswith(".py"):
            return None  # what follows belongs to the script
    return None
