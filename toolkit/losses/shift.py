"""Shift labels and fields from each token to the position that predicts it; no other module shifts.

Legend: B rows, T tokens of a row, S sequences of a packed row, K values of one token.
"""

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
    attention_mask: Tensor | None = None,
    ignore_idx: int = -100,
) -> Tensor:
    """Return the label of every position: the next token of the same sequence.

    Args:
        input_ids: [B, T] (or [T]) int64.
        loss_mask: [B, T] (or [T]); which tokens are scored *as targets*; None: all. With tokens [10, 11, 12, 13] and
            mask [0, 0, 1, 0] the label 12 is at position 1 and everything else is ignored.
        cu_seq_lens: [S + 1] boundaries of a packed row: the last token of each sequence has no label.
        attention_mask: [B, T] (or [T]); 1 for text, 0 for padding on either side, which neither predicts nor is
            predicted. Rows padded on the left need it (or a `loss_mask` without their first token): without it, the
            padding would predict the first token of the text.
        ignore_idx: label of positions without one.

    Returns:
        int64 of the shape of `input_ids`; the last position of every sequence holds `ignore_idx`.

    Raises:
        DataError: a mask has the wrong shape or values other than 0 and 1, or the boundaries do not fit.
    """
    for name, mask in (("loss_mask", loss_mask), ("attention_mask", attention_mask)):
        if mask is not None and mask.shape != input_ids.shape:
            raise DataError(
                f"{name} has shape {list(mask.shape)}; it must be that of input_ids, {list(input_ids.shape)}"
                f"{_how_to_pad(name, mask.shape, input_ids.shape)}"
            )
        if mask is not None and mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
            raise DataError(
                f"{name} holds values other than 0 and 1; 1 marks the tokens that count. (Labels with -100 where "
                "nothing is scored are shifted_labels: pass them to the constructor, already shifted)"
            )
    is_scored = has_next(input_ids.shape, cu_seq_lens, attention_mask, input_ids.device)
    if loss_mask is not None:
        is_scored = is_scored & shift_values(loss_mask.bool(), is_scored, pad=False)
    return shift_values(input_ids, is_scored, pad=ignore_idx)


def _how_to_pad(name: str, shape: torch.Size, wanted: torch.Size) -> str:
    """Say how a mask [B, C] of `shape`, which marks completions, becomes [B, T]; empty for other masks."""
    if name != "loss_mask" or len(shape) != 2 or shape[:-1] != wanted[:-1] or shape[1] >= wanted[1]:
        return ""
    return (
        f". If it is of the last {shape[1]} tokens (a completion), write torch.nn.functional.pad({name}, "
        f"({wanted[1] - shape[1]}, 0))"
    )


def has_next(
    shape: torch.Size, cu_seq_lens: Tensor | None, attention_mask: Tensor | None, device: torch.device
) -> Tensor:
    """Return whether position t and token t + 1 belong to the same sequence, bool of `shape`, [B, T] or [T].

    `attention_mask` has that shape, too; `cu_seq_lens` is [S + 1].
    """
    ids = sequence_ids(shape, cu_seq_lens, device)
    is_followed = torch.zeros(shape, dtype=torch.bool, device=device)
    is_followed[..., :-1] = (ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)
    if attention_mask is not None:
        is_text = attention_mask.bool()
        is_followed[..., :-1] &= is_text[..., 1:] & is_text[..., :-1]
    return is_followed


def shift_values(values: Tensor, is_followed: Tensor, *, pad: float, dim: int = -1) -> Tensor:
    """Move the value of token t + 1 to position t, where it is predicted.

    Args:
        values: [B, T] (or [T], or with K values per token [B, T, K]); index t belongs to token t.
        is_followed: bool [B, T] (or [T]), from `has_next`.
        pad: the value where there is no next token.
        dim: the token axis of `values`, counted from the end.

    Returns:
        A new tensor of the shape and dtype of `values`.
    """
    later = values.roll(-1, dim)  # the first token wraps round to the last position: never followed
    return later.where(is_followed if dim == -1 else is_followed.unsqueeze(-1), pad).to(values.dtype)
