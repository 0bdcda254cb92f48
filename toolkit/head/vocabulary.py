"""A head whose vocabulary is split over ranks: which rank has which columns, and what is summed over ranks.

All ranks of the group have the same hidden states and labels; each has the head rows of its part of the vocabulary.
Ranks exchange [n] numbers, never logits: the largest logit; then the sum of the other exponentials, how many ranks have
the largest logit, the label's logit and the entropy's part. A head that is not split is the group of one rank, which
sends nothing.

Legend: T positions, N scored tokens, n tokens of a chunk, D hidden width, V vocabulary, R ranks that share it,
v local entries (one of padding on a rank without any), [...] any shape.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import DataError


@dataclass(frozen=True)
class VocabGroup:
    """The part of the vocabulary that this rank holds, and the ranks that hold the others."""

    vocabulary: int
    """V, of all ranks."""
    start: int
    """The first local entry."""
    rows: int
    """Local entries; 0 on the last ranks if V is small."""
    ranks: int = 1
    """R."""
    group: Any = field(default=None, repr=False)
    """Process group of torch.distributed; None for one rank."""

    @property
    def is_split(self) -> bool:
        """Whether other ranks hold a part."""
        return self.group is not None

    @property
    def most_rows(self) -> int:
        """Entries of the largest part, from which all ranks make the same chunks."""
        return -(-self.vocabulary // self.ranks)

    def local_mask(self, vocab_mask: Tensor | None, device: torch.device) -> Tensor | None:
        """Return the local part [v] of `vocab_mask` [V]; a rank without entries has one padding entry, excluded."""
        if self.rows == 0 and self.is_split:
            return torch.zeros(1, dtype=torch.bool, device=device)
        return vocab_mask if vocab_mask is None or not self.is_split else vocab_mask[self.start :][: self.rows]

    def excludes(self, local_mask: Tensor | None) -> bool:
        """Whether `local_mask` [v] excludes all columns of this rank, while other ranks have some."""
        return self.is_split and local_mask is not None and not bool(local_mask.any())

    def labels(self, targets: Tensor, rows: Tensor | None = None) -> LocalLabels:
        """Return the labels `targets` [n] as indices into the local columns.

        `rows` [n] are the numbers from 0 to n - 1, if the caller has them.
        """
        rows = torch.arange(targets.shape[0], device=targets.device) if rows is None else rows
        if not self.is_split:
            return LocalLabels((rows, targets), None)
        columns = targets - self.start
        is_local = (columns >= 0) & (columns < self.rows)
        return LocalLabels((rows, columns.clamp(0, max(0, self.rows - 1))), is_local)

    def max_(self, values: Tensor) -> Tensor:
        """Replace `values` [...] by their largest over the ranks."""
        return self._reduced_(values, "MAX")

    def sum_(self, values: Tensor) -> Tensor:
        """Replace `values` [...] by their sum over the ranks."""
        return self._reduced_(values, "SUM")

    def sum_rows_(self, values: Tensor, rows: Tensor) -> Tensor:
        """Sum `rows` [N] of `values` [T, D] over the ranks, in place; the others are 0 everywhere."""
        if not self.is_split or len(rows) == 0:
            return values
        if len(rows) == len(values):
            return self.sum_(values)
        return values.index_copy_(0, rows, self.sum_(values.index_select(0, rows)))

    def check_same(self, labels: Tensor, *options: int) -> None:
        """Raise if the ranks have different labels or options; one collective of a few numbers.

        A head sharded by FSDP looks the same as one whose vocabulary is split, but its ranks have different tokens:
        without this check they would deadlock or return wrong results. `labels` [...] are those of all positions,
        `options` everything that decides which collectives follow.

        Raises:
            DataError: on every rank alike.
        """
        if not self.is_split:
            return
        flat = labels.reshape(-1).long()
        mixed = (flat * (2 * torch.arange(len(flat), device=flat.device) + 1)).sum()
        numbers = torch.stack([flat.new_tensor(len(flat)), mixed, *(flat.new_tensor(option) for option in options)])
        most, least = self.max_(torch.cat([numbers, -numbers])).chunk(2)
        differs = (most != -least).tolist()
        if any(differs[:2]):
            raise DataError(
                f"head_weight is sharded over {self.ranks} ranks by its vocabulary rows, but their labels differ. If "
                "FSDP sharded the head, it was not gathered: call the loss inside the wrapped model's forward. If its "
                "vocabulary is meant to be split, pass the same hidden states and labels on all ranks of the mesh"
            )
        if any(differs):
            raise DataError(
                f"the {self.ranks} ranks that share the head's vocabulary call it with different options (chunk_size, "
                "entropy, scope, retain_bytes, or which of hidden states, weight and bias require a gradient); pass "
                "the same on all ranks"
            )

    def _reduced_(self, values: Tensor, operation: str) -> Tensor:
        if self.is_split and values.numel():
            dist.all_reduce(values, op=getattr(dist.ReduceOp, operation), group=self.group)
        return values


@dataclass(frozen=True)
class LocalLabels:
    """The labels of n rows as indices into the local columns; a label of another rank points to any column."""

    at: tuple[Tensor, Tensor]
    """Rows and columns, [n] each."""
    is_local: Tensor | None
    """[n]; None if all are."""

    def take(self, block: Tensor) -> Tensor:
        """Return the labels' entries [n] of `block` [n, v], 0 for those of other ranks."""
        values = block[self.at]
        return values if self.is_local is None else values.masked_fill(~self.is_local, 0)

    def put_(self, block: Tensor, values: Tensor) -> Tensor:
        """Replace the labels' entries of `block` [n, v] by `values` [n], and return it.

        ``scatter_`` would take 100x the time of ``index_put_`` on a CPU.
        """
        local_values = values if self.is_local is None else values.where(self.is_local, block[self.at])
        return block.index_put_(self.at, local_values)

    def add_(self, block: Tensor, values: Tensor) -> Tensor:
        """Add `values` [n] to the labels' entries of `block` [n, v], and return it."""
        local_values = values if self.is_local is None else values.masked_fill(~self.is_local, 0)
        return block.index_put_(self.at, local_values, accumulate=True)


def vocab_group(weight: Tensor) -> VocabGroup:
    """Return how the vocabulary of a head's `weight` [V, D] is split: not at all, or by ``Shard(0)`` on a 1-D mesh.

    Raises:
        DataError: the weight is sharded in a way that the head does not support.
    """
    if not _is_sharded(weight):
        return VocabGroup(weight.shape[0], 0, weight.shape[0])
    sharded: Any = weight
    mesh, placements = sharded.device_mesh, sharded.placements
    if mesh.ndim != 1 or not _is_row_shard(placements[0]):
        raise DataError(
            f"head_weight is a DTensor with placements {placements} on a mesh of {list(mesh.shape)}; the head takes a "
            "plain tensor, Replicate(), or its vocabulary rows by Shard(0) on a one-dimensional mesh. If FSDP sharded "
            "the head, it was not gathered: call the loss inside the wrapped model's forward"
        )
    vocabulary, size = weight.shape[0], -(-weight.shape[0] // mesh.size())
    start = min(vocabulary, mesh.get_local_rank() * size)
    rows, actual_rows = min(vocabulary, start + size) - start, _local(weight.detach()).shape[0]
    if rows != actual_rows:
        raise DataError(
            f"head_weight has {actual_rows} of {vocabulary} vocabulary rows on rank {mesh.get_local_rank()} of "
            f"{mesh.size()}; DTensor's Shard(0) gives it {rows}. Make it with distribute_tensor, or pass "
            "the global shape to DTensor.from_local"
        )
    return VocabGroup(vocabulary, start, rows, mesh.size(), mesh.get_group() if mesh.size() > 1 else None)


def local_part(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, VocabGroup]:
    """Return local rows [v, D] of `weight` [V, D] and [v] of `bias` [V], differentiable plain tensors, and their group.

    The gradient of a DTensor is a DTensor of the same placement: each rank computes that of its local rows and sends
    nothing. A plain bias, the same on all ranks, gets its full gradient on each of them.
    """
    group = vocab_group(weight)
    weight = _local(weight)
    if bias is not None:
        is_sharded = _is_sharded(bias)
        if is_sharded and vocab_group(bias) != group:
            raise DataError(
                "head_bias is sharded differently from head_weight; shard both by Shard(0) on the same mesh"
            )
        bias = _local(bias)
        if group.is_split and not is_sharded:
            bias = UsedByRanks.apply(bias, group).narrow(0, group.start, group.rows)
    if group.is_split and group.rows == 0:  # one row of padding, so no product is empty
        weight, bias = F.pad(weight, (0, 0, 0, 1)), None if bias is None else F.pad(bias, (0, 1))
    return weight, bias, group


def replicated(hidden: Tensor) -> Tensor:
    """Return `hidden` [..., D] as a plain tensor.

    Raises:
        DataError: the hidden states are sharded.
    """
    if _is_sharded(hidden):
        raise DataError(
            f"hidden_states is a DTensor with placements {getattr(hidden, 'placements', None)}; the head needs all of "
            "it on each rank; redistribute it to Replicate() first"
        )
    return _local(hidden)


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks; every rank uses it alike, so its gradient is that of each part."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: VocabGroup) -> Tensor:
        """Return the sum of `values` [...] over the ranks."""
        return group.sum_(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        return grads[0], None


class UsedByRanks(torch.autograd.Function):
    """The identity on a tensor that each rank uses for its part; the gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: VocabGroup) -> Tensor:
        """Return `values` [...]."""
        ctx.group = group
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: D102
        return ctx.group.sum_(grads[0].clone(memory_format=torch.contiguous_format)), None


def _is_dtensor(tensor: Tensor) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # not loaded: no DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)


def _is_sharded(tensor: Any) -> bool:
    """Whether a rank has only a part of `tensor`."""
    return _is_dtensor(tensor) and not all(placement.is_replicate() for placement in tensor.placements)


def _is_row_shard(placement: Any) -> bool:
    from torch.distributed.tensor import Shard

    return type(placement) is Shard and placement.dim == 0  # a subclass cuts the rows in another order


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local(grad_placements=tensor.placements) if _is_dtensor(tensor) else tensor
    return local
