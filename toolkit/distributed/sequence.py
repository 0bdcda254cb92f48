"""Sequence-parallel split and gather. R ranks of the mesh, T positions, t positions of a shard, [...] any shape.

Two orders are in use. "contiguous": a rank has one piece of the row. "head_tail": the row is cut into 2 R pieces, and
rank r has piece r and piece 2 R - 1 - r, so under causal attention all ranks compute as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.errors import ConfigError, DataError, listed

Order = Literal["contiguous", "head_tail"]


@dataclass(frozen=True)
class SequenceMesh:
    """The ranks that share each sequence, and which positions each has; it stands wherever an `sp_mesh` is taken."""

    group: Any
    """Their process group."""
    order: Order = "contiguous"
    """"head_tail": that of torch's ``context_parallel``."""
    is_packable: bool = True
    """Whether a row may hold several sequences; False where attention does not separate them."""

    def __post_init__(self) -> None:
        if self.order not in get_args(Order):
            raise ConfigError(f"order={self.order!r} is not an order of shards; choose {listed(get_args(Order))}")

    def size(self) -> int:
        """Return R."""
        return dist.get_world_size(self.group)

    def get_local_rank(self) -> int:
        """Return the rank of this process among them."""
        return dist.get_rank(self.group)

    def get_group(self) -> Any:
        """Return their process group."""
        return self.group


SPMesh: TypeAlias = DeviceMesh | SequenceMesh
"""Ranks that share a sequence; a one-dimensional `DeviceMesh` has contiguous shards."""


def order_of(sp_mesh: SPMesh) -> Order:
    """Return the order of the shards."""
    return sp_mesh.order if isinstance(sp_mesh, SequenceMesh) else "contiguous"


def multiple_of(sp_mesh: SPMesh) -> int:
    """Return what the length of a row must be a multiple of, so every rank gets the same number of positions."""
    return sp_mesh.size() * (2 if order_of(sp_mesh) == "head_tail" else 1)


def padded(values: Tensor, multiple: int, *, dim: int = -1, pad: float) -> Tensor:
    """Return `values` [..., T, ...] with `pad` added at the end of `dim` until its length is a multiple."""
    missing = -values.shape[dim] % multiple
    if not missing:
        return values
    trailing = values.dim() - 1 - (dim % values.dim())
    return F.pad(values, [0, 0] * trailing + [0, missing], value=pad)


def sp_split(values: Tensor, sp_mesh: SPMesh, *, dim: int = -1, pad: float) -> Tensor:
    """Return this rank's shard [..., t, ...] of `values` along `dim`, padded so every rank gets the same length.

    Args:
        values: [..., T, ...] the full tensor, the same on every rank of the mesh.
        sp_mesh: one-dimensional mesh of the ranks that share a sequence.
        dim: the token axis.
        pad: value that fills the end when the length is not divisible by the size of the mesh. In head-tail order
            nothing is filled: the model's inputs have another order if their length is not divisible by 2 R.

    Raises:
        DataError: the order is "head_tail" and T is not divisible by 2 R.
    """
    multiple, index = multiple_of(sp_mesh), sp_mesh.get_local_rank()
    if order_of(sp_mesh) == "contiguous":
        return padded(values, multiple, dim=dim, pad=pad).chunk(multiple, dim=dim)[index].contiguous()
    length = values.shape[dim]
    if length % multiple:
        raise DataError(
            f"a row of {length} positions cannot be split over {sp_mesh.size()} ranks in head-tail order; its length "
            f"must be divisible by {multiple}, twice the number of ranks: pad the batch (pad_to_multiple_of={multiple} "
            "of a tokenizer), input_ids and all per-token fields alike"
        )
    pieces = values.split(max(1, length // multiple), dim=dim)
    return torch.cat([pieces[index], pieces[-1 - index]], dim=dim) if length else values


def sp_joined(shards: Sequence[Tensor], sp_mesh: SPMesh, *, dim: int = -1) -> Tensor:
    """Return the row [..., R t, ...] from the `shards` of all ranks, [..., t, ...] each, in the order of the mesh.

    Raises:
        DataError: the order is "head_tail" and t is odd.
    """
    if order_of(sp_mesh) == "contiguous":
        return torch.cat(list(shards), dim=dim)
    length = shards[0].shape[dim]
    if length % 2:
        raise DataError(
            f"a shard of {length} positions is not in head-tail order, where a rank has two pieces of equal length; "
            f"the length of the row must be divisible by {multiple_of(sp_mesh)}"
        )
    heads, tails = zip(*(shard.split([length // 2, length // 2], dim=dim) for shard in shards), strict=True)
    return torch.cat([*heads, *tails[::-1]], dim=dim)


def sp_gather(shard: Tensor, sp_mesh: SPMesh, *, dim: int = -1) -> Tensor:
    """Return all shards joined, [..., R t, ...] with the padding of `sp_split`; every rank of the mesh must call it.

    Differentiable: where every rank computes a part of the loss from the full tensor, the gradient of a shard is the
    sum of its gradients on all ranks. That takes a second collective, in backward.

    Args:
        shard: [..., t, ...] this rank's shard, of the same shape on every rank.
        sp_mesh: one-dimensional mesh of the ranks that share a sequence.
        dim: the token axis.

    Raises:
        DataError: the order is "head_tail" and t is odd.
    """
    return _SPGather.apply(shard, sp_mesh, dim)


class _SPGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, sp_mesh: SPMesh, dim: int) -> Tensor:
        ctx.sp_mesh, ctx.dim = sp_mesh, dim
        shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(sp_mesh.size())]
        dist.all_gather(shards, shard.contiguous(), group=sp_mesh.get_group())
        return sp_joined(shards, sp_mesh, dim=dim)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.sp_mesh.get_group())
        return sp_split(total, ctx.sp_mesh, dim=ctx.dim, pad=0.0), None, None
