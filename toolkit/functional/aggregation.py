"""How much each token counts, before the division by the global denominator. N: selected tokens, S: sequences.

A mode gives every token an unnormalised weight; the denominator is the sum of these weights over all micro-batches and
ranks. With n the number of selected tokens in a token's own sequence:

======  ===========  =============================================
mode    weight       the loss is then
======  ===========  =============================================
token   1            the mean over all tokens
sample  1 / n        the mean over sequences of their token means
square  1 / sqrt(n)  between the two
======  ===========  =============================================

Source: XTuner's ``loss_reduction``. A sequence without a selected token counts for nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toolkit.functional.segments import segment_sum

EXPONENTS = {"token": 0.0, "sample": -1.0, "square": -0.5}


def token_weights(is_active: Tensor, ids: Tensor, mode: str) -> Tensor:
    """Return the unnormalised weight of every position under `mode`.

    Args:
        is_active: bool, [1, T] or [B, T]; True where the position is scored.
        ids: int64 of the same shape; the sequence of each position, negative for none.
        mode: a key of `EXPONENTS`.

    Returns:
        float64 of the same shape; 0 where `is_active` is False.
    """
    # fp64: a count above 2^24 would be rounded in fp32, above 256 in bf16.
    dtype = torch.float64 if is_active.device.type != "mps" else torch.float32
    active = is_active.to(dtype)
    if mode == "token":
        return active
    flat = (ids + 1).reshape(-1)  # position 0 collects what belongs to no sequence
    num_sequences = int(flat.max()) + 1 if flat.numel() else 1
    lengths = segment_sum(active.reshape(-1), flat, num_sequences)[flat].reshape(active.shape)
    return active * lengths.clamp(min=1).pow(EXPONENTS[mode])
