"""How a step is spread: over processes, micro-batches, sequence-parallel shards, padded or packed rows.

Legend: B rows (a sequence each), T positions of a row, S sequences of a packed row, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import all_reduce_sum, gradient_divisor, sp_split
from toolkit.distributed.sequence import Order, SPMesh, multiple_of, padded
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import LossContextInputItem
from toolkit.losses.record import PerToken
from toolkit.losses.samples import Batch

NOWHERE = -1
"""Index of a position that is padding."""


@dataclass(frozen=True)
class Layout:
    """One way to spread a step."""

    processes: int = 1
    micro_batches: int = 1
    """Of each process."""
    sequence_parallel: int = 1
    """Processes that share a sequence; divides `processes`."""
    is_packed: bool = False
    """Sequences side by side in one row with ``cu_seq_lens``, instead of padded rows."""
    mode: str = "eager"
    """Of the loss."""
    order: Order = "contiguous"
    """Of the shards of a sequence, see `toolkit.distributed.SequenceMesh`."""

    @property
    def data_parallel(self) -> int:
        """Data shards: one for each process, or each team of processes that share sequences."""
        return self.processes // self.sequence_parallel

    @property
    def slots(self) -> int:
        """Micro-batches of all processes together."""
        return self.data_parallel * self.micro_batches

    def __str__(self) -> str:
        words = [_count(self.processes, "process", "es"), _count(self.micro_batches, "micro-batch", "es")]
        if self.processes > 1 and self.micro_batches > 1:
            words[1] += " each"
        if self.sequence_parallel > 1:
            order = " in head-tail order" if self.order == "head_tail" else ""
            words.append(f"{self.sequence_parallel} of them share each sequence{order}")
        return ", ".join([*words, "packed" if self.is_packed else "padded", self.mode])


def _count(number: int, what: str, plural: str) -> str:
    return f"{number} {what}{plural if number > 1 else ''}"


def layouts_of(
    processes: int,
    micro_batches: Iterable[int],
    sequence_parallel: Iterable[int],
    packed: Iterable[bool],
    modes: Iterable[str],
) -> list[Layout]:
    """Return every combination, simple ones first; shards that do not divide the processes are skipped."""
    layouts = [
        Layout(processes, number, shards, is_packed, mode)
        for shards, number, is_packed, mode in product(sequence_parallel, micro_batches, packed, modes)
        if processes % shards == 0
    ]
    return sorted(
        layouts,
        key=lambda layout: (layout.sequence_parallel, layout.micro_batches, layout.is_packed, layout.mode != "eager"),
    )


@dataclass(frozen=True)
class Part:
    """What one process holds of a step: the argument of a loop.

    A loop computes the loss of every micro-batch, calls backward, and leaves the gradients as its back-end would:
    ``head_weight.grad`` (and ``head_bias.grad``) reduced over the processes, ``hidden_states[i].grad`` as it is.
    """

    loss_cfg: Any
    items: list[Any]
    """One for each micro-batch; the shards of this process under sequence parallelism."""
    hidden_states: list[Tensor]
    """[B, T, D] (packed [1, T, D]) of each micro-batch; leaves that require a gradient."""
    head_weight: Tensor
    """[V, D], a leaf."""
    head_bias: Tensor | None
    """[V], a leaf."""
    cu_seq_lens_list: list[Tensor | None] | None
    """[S + 1] boundaries of each packed row, over all its shards; None: every row is a sequence."""
    sp_mesh: SPMesh | None
    """The processes that share a sequence with this one."""
    flat_indices: list[Tensor] = field(default_factory=list, repr=False)
    """For each micro-batch the index of every position in the flattened full batch; `NOWHERE` for padding."""

    def reduce_gradients(self) -> None:
        """Average or sum the head's gradients over processes, as a back-end does after the last backward.

        ``loss_cfg.gradient_reduction`` says which; DDP and FSDP average. Do not call it if a wrapper already does this.
        """
        for leaf in (self.head_weight, self.head_bias):
            if leaf is None:
                continue
            if leaf.grad is None:
                leaf.grad = torch.zeros_like(leaf)
            leaf.grad = all_reduce_sum(leaf.grad)
            if self.loss_cfg.gradient_reduction == "mean":
                leaf.grad /= gradient_divisor()


def part_of(batch: Batch, cfg: BaseLossConfig, layout: Layout, team: int, sp_mesh: SPMesh | None) -> Part:
    """Return what a process holds: part number `team` of ``layout.data_parallel``, which the `sp_mesh` shares.

    `cfg` is in the mode of the layout.
    """
    rows_of_slots = _slots(batch, cfg, layout)
    rows_of_batches = rows_of_slots[team * layout.micro_batches : (team + 1) * layout.micro_batches]
    items, states, bounds, flat_indices = [], [], [], []
    for rows in rows_of_batches:
        item, hidden, index, edges = _micro_batch(batch, cfg, rows, is_packed=layout.is_packed)
        if sp_mesh is not None:
            if layout.order == "head_tail":  # as a collator does that pads to a multiple
                item, hidden, index = _padded(item, hidden, index, multiple_of(sp_mesh), batch.garbage, cfg.ignore_idx)
            item = item.sp_split(sp_mesh, ignore_idx=cfg.ignore_idx)
            hidden = sp_split(hidden, sp_mesh, dim=-2, pad=batch.garbage)
            index = sp_split(index, sp_mesh, pad=NOWHERE)
        items.append(item)
        states.append(hidden.clone().requires_grad_())
        bounds.append(edges)
        flat_indices.append(index)
    bias = None if batch.head_bias is None else batch.head_bias.detach().clone().requires_grad_()
    weight = batch.head_weight.detach().clone().requires_grad_()
    return Part(cfg, items, states, weight, bias, bounds if layout.is_packed else None, sp_mesh, flat_indices)


def _padded(
    item: LossContextInputItem, hidden: Tensor, index: Tensor, multiple: int, garbage: float, ignore_idx: int
) -> tuple[LossContextInputItem, Tensor, Tensor]:
    """Return item, hidden states and indices with positions added at the end, up to a multiple."""
    changes = {
        name: padded(value, multiple, dim=mark.dim, pad=ignore_idx if name == "shifted_labels" else mark.pad)
        for name, value, mark in item.per_token()
    }
    hidden, index = padded(hidden, multiple, dim=-2, pad=garbage), padded(index, multiple, pad=NOWHERE)
    return item.replace(**changes), hidden, index


def counts_empty(cfg: BaseLossConfig) -> bool:
    """Whether sequences without scored tokens are counted."""
    return getattr(getattr(cfg, "aggregation", None), "count_empty", False)


def _slots(batch: Batch, cfg: BaseLossConfig, layout: Layout) -> list[list[int]]:
    """Spread the rows unevenly over all micro-batches, the same way on every call; some may stay empty."""
    groups = getattr(batch.item, "group_ids", None)
    rows = list(range(len(batch.row_lengths)))
    compares = isinstance(cfg, BaseRLLossConfig) and cfg.policy.scope == "group"
    if groups is not None and compares and getattr(batch.item, "current_logprobs", None) is None:
        # Without a second pass the sequences of a prompt must be in one micro-batch.
        units = [[row for row in rows if int(groups[row, 0]) == group] for group in groups[:, 0].unique().tolist()]
    else:
        units = [[row] for row in rows]
    draw = torch.Generator().manual_seed(1000 * layout.processes + 10 * layout.micro_batches + layout.is_packed)
    if counts_empty(cfg):
        unit_slots = [number % layout.slots for number in range(len(units))]  # an idle micro-batch would be counted
    else:
        unit_slots = torch.randint(0, layout.slots, (len(units),), generator=draw).tolist()
        unit_slots[0], unit_slots[-1] = layout.slots - 1, 0  # never all in one, and not in order
    return [
        [row for unit, unit_slot in zip(units, unit_slots, strict=True) if unit_slot == slot for row in unit]
        for slot in range(layout.slots)
    ]


def _micro_batch(
    batch: Batch, cfg: BaseLossConfig, rows: Sequence[int], *, is_packed: bool
) -> tuple[LossContextInputItem, Tensor, Tensor, Tensor | None]:
    """Return item, hidden states, indices and boundaries of some rows; without rows: two positions of padding."""
    item, width, is_idle = batch.item, batch.item.shifted_labels.shape[1], not rows
    full_index = torch.arange(item.shifted_labels.numel(), device=item.shifted_labels.device)
    full_index = full_index.reshape(item.shifted_labels.shape)
    rows, lengths = ([0], [2]) if is_idle else (rows, [batch.row_lengths[row] for row in rows])
    if is_packed:
        edges = torch.tensor([0, *lengths], device=full_index.device).cumsum(0)

        def taken(value: Tensor, axis: int) -> Tensor:
            pieces = [value[row : row + 1].narrow(axis, 0, n) for row, n in zip(rows, lengths, strict=True)]
            return torch.cat(pieces, dim=axis)

    else:
        row_index, width, edges = torch.tensor(rows, device=full_index.device), max(1, *lengths), None

        def taken(value: Tensor, axis: int) -> Tensor:
            return value.index_select(0, row_index).narrow(axis, 0, width)

    marks = [(name, value, item.layout(name)) for name, value in item.tensors()]
    changes = {name: taken(value, mark.dim) for name, value, mark in marks if isinstance(mark, PerToken)}
    hidden, index = taken(batch.hidden_states.detach(), -2), taken(full_index, -1)
    if is_idle:  # nothing is scored, as on a process without data
        changes |= {
            name: torch.full_like(value, batch.garbage) for name, value in changes.items() if value.is_floating_point()
        }
        changes["shifted_labels"] = torch.full_like(changes["shifted_labels"], cfg.ignore_idx)
        hidden, index = torch.full_like(hidden, batch.garbage), torch.full_like(index, NOWHERE)
    return item.replace(**changes), hidden, index, edges
