"""Values in the wrong places: rows in another order, and the ends of rows without values.

Legend: B rows, T positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.runner.diagnosis.pair import Pair

MOST_ROWS = 64
"""Rows that are compared with each other."""
SHORTEST = 6
"""Values of a row below which it may fit another by chance."""
MUCH_CLOSER = 0.25
"""A row fits another one if its difference is less than this part of that to its own place."""
INVALID = (0.0, 1.0)
"""What samplers and frameworks write where there is no log-probability."""


def missing_values(pair: Pair, usual: float) -> Tensor:
    """Return which values at the end of rows are constant and unlike the trainer's, [B, T] bool.

    A single last value counts if it is not finite or one of `INVALID`; more than one if they are equal.

    Args:
        pair: of the arrays.
        usual: difference in nats that is usual.
    """
    result = torch.zeros_like(pair.mask)
    for row, mask in enumerate(pair.mask):
        columns = mask.nonzero().squeeze(-1)
        if not len(columns):
            continue
        r, t = pair.rollout[row][columns], pair.trainer[row][columns]
        is_same = (r == r[-1]) | (r.isnan() & r[-1].isnan())
        run = int(is_same.flip(0).long().cumprod(0).sum())
        is_off = ~r.isfinite() | ((r - t).abs() > usual)
        is_invalid = not bool(r[-1].isfinite()) or float(r[-1]) in INVALID
        if (run > 1 or is_invalid) and bool(is_off[-run:].any()):
            result[row, columns[-run:]] = True
    return result


def row_order(pair: Pair, usual: float) -> tuple[dict[int, int], float] | None:
    """Return which rows of the sampler fit another row of the trainer, and the difference there in nats; None: none.

    Args:
        pair: without values that are missing.
        usual: difference in nats that is usual.
    """
    rows = pair.rows[:MOST_ROWS]
    moved: dict[int, int] = {}
    left = []
    for row, (r, t) in enumerate(rows):
        overlap = min(len(r), len(t))
        if overlap < SHORTEST or float((r - t).abs().mean()) <= 2 * usual:
            continue
        costs = {
            other: float((r[:size] - values[:size]).abs().mean())
            for other, (_, values) in enumerate(rows)
            if other != row and (size := min(len(r), len(values))) >= SHORTEST
        }
        best = min(costs, key=lambda other: costs[other], default=None)
        if best is not None and costs[best] < MUCH_CLOSER * float((r - t).abs().mean()):
            moved[row] = best
            left.append(costs[best])
    return (moved, sum(left) / len(left)) if len(moved) > 1 else None
