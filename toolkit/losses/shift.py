"""From unshifted text to shifted labels: the one place that owns the off-by-one. B rows, T tokens of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.functional.segments import sequence_ids


def shift_labels(
    input_ids: Tensor,
    loss_mask: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    *,
    ignore_idx: int = -100,
) -> Tensor:
    """Return the label of every position: the next token of the same sequence.

    Args:
        input_ids: [B, T] (or [T]) int64.
        loss_mask: same shape; which tokens are to be scored *as targets*; None: all. With tokens [10, 11, 12, 13] and
            mask [0, 0, 1, 0] the label 12 stands at position 1 and everything else is ignored.
        cu_seq_lens: [S + 1] boundaries of a packed row: the last token of each sequence has no label.
        ignore_idx: label of positions without one.

    Returns:
        int64 of the shape of `input_ids`; the last position of every sequence holds `ignore_idx`.

    Raises:
        DataError: the mask has another shape, or the boundaries do not fit.
    """
    if loss_mask is not None and loss_mask.shape != input_ids.shape:
        raise DataError(
            f"loss_mask has shape {list(loss_mask.shape)}; it must be that of input_ids, {list(input_ids.shape)}"
        )
    ids = sequence_ids(input_ids.shape, cu_seq_lens, input_ids.device)
    same_sequence = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    is_scored = same_sequence if loss_mask is None else same_sequence & loss_mask[..., 1:].bool()
    labels = torch.full_like(input_ids, ignore_idx)
    labels[..., :-1] = input_ids[..., 1:].where(is_scored, ignore_idx)
    return labels
