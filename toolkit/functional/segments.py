"""Sequences on packed and padded rows; the only module that interprets ``cu_seq_lens``.

Legend: B rows, T positions of a row, S sequences, N selected (active) tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from toolkit.errors import DataError

NO_SEQUENCE = -1
"""Index of a position that belongs to no sequence, such as the padding at the end of a packed row."""


def sequence_ids(shape: torch.Size, cu_seq_lens: Tensor | None, device: torch.device | None = None) -> Tensor:
    """Number the sequence that each position belongs to: int64 of `shape`, `NO_SEQUENCE` where it belongs to none.

    Without `cu_seq_lens` every row is one sequence. With it the row is packed: sequence s covers positions
    ``cu_seq_lens[s] .. cu_seq_lens[s+1] - 1``, and positions after the last boundary belong to none.

    Args:
        shape: shape of the labels, [T], [1, T] (packed) or [B, T] (padded).
        cu_seq_lens: [S + 1] int boundaries, 0 first, not decreasing, at most T; only for one packed row.
        device: device of the result; that of `cu_seq_lens` by default.

    Raises:
        DataError: the boundaries do not start at 0, decrease, exceed T, or come with more than one row.
    """
    rows, length = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[-1])
    if cu_seq_lens is None:
        return torch.arange(rows, device=device).unsqueeze(-1).expand(rows, length).reshape(shape)
    if rows != 1:
        raise DataError(
            f"cu_seq_lens describes one packed row [1, T], but the labels have {rows} rows; "
            "pack them into one row or leave cu_seq_lens out (each row is then one sequence)"
        )
    if not isinstance(cu_seq_lens, Tensor) or cu_seq_lens.dim() != 1 or cu_seq_lens.is_floating_point():
        raise DataError(f"cu_seq_lens={cu_seq_lens!r} must be a one-dimensional integer tensor of boundaries")
    bounds = cu_seq_lens.detach().to(device=device, dtype=torch.int64)
    steps = bounds.diff()
    if len(bounds) < 2 or bounds[0] != 0 or bool((steps < 0).any()) or bounds[-1] > length:
        raise DataError(
            f"cu_seq_lens={cu_seq_lens.tolist()} does not cut a row of {length} positions: it must start at 0, "
            f"never decrease and end at {length} or before"
        )
    ids = torch.arange(len(steps), device=bounds.device).repeat_interleave(steps)
    tail = ids.new_full((length - len(ids),), NO_SEQUENCE)
    return torch.cat([ids, tail]).reshape(shape)


def turn_ids(is_scored: Tensor, sequence_ids: Tensor) -> Tensor:
    """Number the turns: each contiguous run of scored positions within a sequence is one.

    `is_scored` and `sequence_ids` are [B, T] or [T]. The result has their shape: 0, 1, 2 ... in row order,
    `NO_SEQUENCE` where a position is not scored. In a conversation the positions between two runs belong to someone
    else (a user, a tool). Two sequences packed side by side never share a turn, nor do two rows.
    """
    goes_on = torch.zeros_like(is_scored)
    goes_on[..., 1:] = is_scored[..., :-1] & (sequence_ids[..., 1:] == sequence_ids[..., :-1])
    is_start = is_scored & ~goes_on
    numbers = is_start.reshape(-1).cumsum(0).reshape(is_scored.shape) - 1
    return numbers.masked_fill(~is_scored, NO_SEQUENCE)


def segment_sum(values: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    """Sum the `values` [N] of each sequence, numbered from 0 by `ids` [N] int64: [S], 0 for one without a value."""
    return values.new_zeros(num_sequences).index_add(0, ids, values)


def segment_mean(values: Tensor, ids: Tensor, num_sequences: int) -> Tensor:
    """Average the `values` [N] of each sequence, numbered by `ids` [N]: [S], as `segment_sum`."""
    counts = segment_sum(torch.ones_like(values), ids, num_sequences)
    return segment_sum(values, ids, num_sequences) / counts.clamp(min=1)


def suffix_sum(values: Tensor, ids: Tensor, discount: float = 1.0, positions: Tensor | None = None) -> Tensor:
    """Sum each token's value and those after it in its sequence: [N] ``sum over k >= t of discount^(k - t) values_k``.

    Args:
        values: [N], the tokens of a sequence contiguous and in order.
        ids: [N] int64, the sequence of each token.
        discount: in (0, 1].
        positions: [N] int64, the positions k and t where tokens between were skipped; None: consecutive.
    """
    # Sums over spans of 1, 2, 4 ... tokens: log2(N) steps without the powers discount^-t that would overflow.
    total, span = values, 1
    log_discount = math.log(max(discount, 1e-300))
    where = torch.arange(len(values), device=values.device) if positions is None else positions
    while span < len(values):
        is_same = ids[span:] == ids[:-span]
        if not bool(is_same.any()):
            break
        distance = (where[span:] - where[:-span]).clamp(min=0).to(values.dtype)
        faded = total[span:] * (log_discount * distance).exp()
        total = torch.cat([total[:-span] + faded.where(is_same, 0.0), total[-span:]])
        span *= 2
    return total
