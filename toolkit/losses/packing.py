"""Pack sequences side by side into one row, and unpack them.

Legend: T positions of a row, S sequences, M rows (one for each micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.items import LossContextInputItem

ItemT = TypeVar("ItemT", bound=LossContextInputItem)


def plan_rows(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Assign sequences to few rows (not always the fewest): the longest first, each to the first row with room.

    Args:
        lengths: tokens of each sequence.
        max_tokens: capacity of a row; a longer sequence gets a separate row.

    Returns:
        For each of M rows the numbers of its sequences, in ascending order; pass it to `in_order` afterwards.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        row = next((row for row, free in enumerate(room) if lengths[number] <= free), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(max_tokens)
        rows[row].append(number)
        room[row] -= lengths[number]
    return [sorted(numbers) for numbers in rows]


def pack(items: Sequence[ItemT]) -> tuple[ItemT, Tensor]:
    """Put items side by side into one packed row.

    Args:
        items: of one class, one sequence each, [1, T] or [T]; already shifted, as all items are, so no label crosses
            into the next sequence. All must have the same fields.

    Returns:
        The item [1, T of all], and its boundaries ``cu_seq_lens`` [S + 1] int64.

    Raises:
        DataError: `items` is empty, an item has several rows or other fields than the first, or ``rollout_spec``
            differs.
    """
    if not items:
        raise DataError("pack() got no items; give at least one")
    first = items[0]
    names = [name for name, _ in first.tensors()]
    for index, item in enumerate(items):
        if item.shifted_labels.dim() == 2 and len(item.shifted_labels) != 1:
            raise DataError(f"items[{index}] has {len(item.shifted_labels)} rows; give pack() one item per sequence")
        differ = sorted({*names} ^ {name for name, _ in item.tensors()})
        what = f"only one of items[0] and items[{index}] has {', '.join(differ)}" if differ else "their classes differ"
        if type(item) is not type(first) or differ:
            raise DataError(f"items of one row must have the same fields, but {what}")
    others = {name: getattr(first, name) for name in type(first).model_fields if name not in names}
    for name, value in others.items():
        if any(getattr(item, name) != value for item in items):
            raise DataError(f"items of one row must have the same {name}, but it differs between them")
    joined = {}
    for name, _, mark in first.per_token():
        values = [getattr(item, name) for item in items]
        rows = [value if value.dim() == 2 + mark.trailing else value.unsqueeze(0) for value in values]
        joined[name] = torch.cat(rows, mark.dim)
    lengths = [0] + [item.shifted_labels.shape[-1] for item in items]
    return type(first)(**joined, **others), torch.tensor(lengths, device=first.shifted_labels.device).cumsum(0)


def unpack(values: Tensor, cu_seq_lens: Tensor, *, dim: int = -1) -> list[Tensor]:
    """Cut a packed tensor at the boundaries of its sequences.

    Args:
        values: [1, T] or [T], or with `dim` anything that has a token axis, such as hidden states [1, T, D].
        cu_seq_lens: [S + 1], as from `pack`; positions after the last boundary are padding and are skipped.
        dim: the token axis.

    Returns:
        S views, in the order of the row.
    """
    bounds = cu_seq_lens.tolist()
    if not 0 <= bounds[-1] <= values.shape[dim]:
        raise DataError(f"cu_seq_lens ends at {bounds[-1]}, but the values have {values.shape[dim]} positions")
    return list(values.narrow(dim, 0, bounds[-1]).split(cu_seq_lens.diff().tolist(), dim=dim))


def in_order(parts: Sequence[Sequence[Tensor]], rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """Return the values of each sequence in the original order of the sequences.

    Rows planned by length hold sequences in another order: without this call, log-probabilities, entropies or weights
    would belong to the wrong prompts, and nothing would fail.

    Args:
        parts: for each row the values of its sequences, any shape, as from `unpack`.
        rows: for each row the numbers of its sequences, as from `plan_rows`.

    Raises:
        DataError: numbers and values do not match, or the numbers are not 0 .. S - 1, each once.
    """
    if [len(part) for part in parts] != [len(row) for row in rows]:
        raise DataError(
            f"rows of {[len(part) for part in parts]} values do not match rows of {[len(row) for row in rows]} numbers"
        )
    numbered = {
        number: value for part, row in zip(parts, rows, strict=True) for value, number in zip(part, row, strict=True)
    }
    total = sum(len(row) for row in rows)
    if sorted(numbered) != list(range(total)):
        raise DataError(f"rows={[list(row) for row in rows]} must hold each of 0 .. {total - 1} once")
    return [numbered[number] for number in range(total)]
