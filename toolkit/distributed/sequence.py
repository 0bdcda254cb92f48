"""Sequence-parallel split and gather. R ranks of the mesh, T positions, t positions of a shard, [...] any shape."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


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
