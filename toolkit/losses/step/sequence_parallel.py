"""Sequence parallelism: a mesh of ranks shares each row, every rank holding one piece of its positions.

The few numbers that a token has beside its hidden state (label, advantage, log-probabilities ...) are gathered over the
mesh once for all micro-batches of a step. Weights and corrections are computed on whole rows, and the result is split
again. So everything is computed in one way, with and without sequence parallelism.

Legend: B rows, T positions of a row, P ranks of the mesh.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.distributed import collective_device
from toolkit.distributed.sequence import SequenceMesh, SPMesh, sp_joined
from toolkit.errors import DataError
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.step.totals import rejected_elsewhere

ItemT = TypeVar("ItemT", bound=LossContextInputItem)


def local_and_full_items(
    checked: Callable[[], list[ItemT]],
    sp_mesh: SPMesh | None,
    cu_seq_lens_list: Sequence[Tensor | None] | None = None,
) -> tuple[list[ItemT], list[ItemT]]:
    """Return this rank's items, and the same over whole rows [B, T]; all ranks of the mesh must call it together.

    `checked` returns this rank's pieces, [B, T / P] each, one for each micro-batch of the step; its error is raised
    after the other ranks of the mesh, which wait for the pieces, know of it. Items over whole rows include padding and
    are equal on every rank. They have no candidates ([.., K]): only the rank that scores a token needs them.

    Raises:
        DataError: the ranks differ in the number of micro-batches, their shapes, or their fields; or the items of
            another rank of the mesh are invalid; or a row of `cu_seq_lens_list`, [S + 1] boundaries each, has several
            sequences that attention would mix.
    """
    if sp_mesh is None:
        items = checked()
        return items, items
    try:
        _check_packable(cu_seq_lens_list or (), sp_mesh)
        items, error = checked(), None
    except Exception as caught:  # of any type: the other ranks must know of it before it is raised
        items, error = [], caught
    return items, _full_items(items, error, sp_mesh)


def _check_packable(cu_seq_lens_list: Sequence[Tensor | None], sp_mesh: SPMesh | None) -> None:
    """Raise if a row has several sequences, [S + 1] boundaries each, and the attention of `sp_mesh` mixes them.

    Raises:
        DataError: it does.
    """
    if not isinstance(sp_mesh, SequenceMesh) or sp_mesh.is_packable:
        return
    for index, bounds in enumerate(cu_seq_lens_list):
        if bounds is not None and len(bounds) > 2:
            raise DataError(
                f"cu_seq_lens_list[{index}] has {len(bounds) - 1} sequences in a row, but accelerate's context "
                "parallelism replaces the attention mask by a causal one, so each would see those before it; give one "
                "sequence for each row, padded on the right"
            )


def _full_items(items: Sequence[ItemT], error: Exception | None, sp_mesh: SPMesh) -> list[ItemT]:
    per_token = [(index, *field) for index, item in enumerate(items) for field in item.per_token()]
    fields = [(index, name, value) for index, name, value, mark in per_token if not mark.trailing]
    _check_alike(items, error, [(name, tuple(value.shape)) for _, name, value in fields], sp_mesh)
    if not fields:
        return list(items)
    local_bits = torch.cat([_as_bits(value) for _, _, value in fields])
    device = collective_device()
    pieces = [torch.empty_like(local_bits, device=device) for _ in range(sp_mesh.size())]
    dist.all_gather(pieces, local_bits.to(device), group=sp_mesh.get_group())
    ends = torch.tensor([value.numel() for _, _, value in fields]).cumsum(0).tolist()
    changes: list[dict[str, Tensor]] = [{} for _ in items]
    for (index, name, value), end in zip(fields, ends, strict=True):
        span = slice(end - value.numel(), end)
        shards = [_from_bits(piece[span].to(value.device), value) for piece in pieces]
        changes[index][name] = sp_joined(shards, sp_mesh)
    return [
        item.replace(**dict.fromkeys(name for name, _, mark in item.per_token() if mark.trailing), **full)
        for item, full in zip(items, changes, strict=True)
    ]


def _as_bits(value: Tensor) -> Tensor:
    """Return a field as the bits of a flat int64: labels and group ids are integers, all else fits a float64."""
    flat = value.detach().reshape(-1)
    return flat.double().view(torch.int64) if flat.is_floating_point() else flat.long()


def _from_bits(bits: Tensor, like: Tensor) -> Tensor:
    values = bits.contiguous().view(torch.float64).to(like.dtype) if like.is_floating_point() else bits.to(like.dtype)
    return values.reshape(like.shape)


def _check_alike(
    items: Sequence[LossContextInputItem],
    error: Exception | None,
    shapes: list[tuple[str, tuple[int, ...]]],
    sp_mesh: SPMesh,
) -> None:
    """Compare a fingerprint of what will be gathered: ranks that differ would mix up their numbers, or hang."""
    mark = [error is not None, len(items), zlib.crc32(repr(shapes).encode())]
    local_mark = torch.tensor(mark, dtype=torch.int64, device=collective_device())
    gathered = [torch.empty_like(local_mark) for _ in range(sp_mesh.size())]
    dist.all_gather(gathered, local_mark, group=sp_mesh.get_group())
    everyone = torch.stack(gathered).tolist()
    if error is not None:
        raise error
    failed = [mesh_rank for mesh_rank, (has_failed, *_) in enumerate(everyone) if has_failed]
    if failed:
        raise rejected_elsewhere(f"rank {failed[0]} of the mesh that shares sequences")
    if any(other != everyone[0] for other in everyone):
        has = ", ".join(f"{name} {list(shape)}" for name, shape in shapes[:12])
        raise DataError(
            "the ranks that share sequences differ in their number of micro-batches, their shapes, or the fields of "
            f"their items; this rank has {len(items)}: {has}. Split every field with item.sp_split(sp_mesh)"
        )
