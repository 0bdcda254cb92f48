"""Additive terms of the model, such as a router's loss or a z-loss, added to the loss of this package.

A policy loss is calibrated: each micro-batch gives its share of the step. A term of the model is a *mean* over the
tokens of one forward: added as it is, it grows with the number of micro-batches; multiplied by the loss's factor for
DDP, it also grows with the number of ranks (huggingface/transformers#48706).

    loss = context.forward(...)[0] + router_coef * weight * output.aux_loss      # weight: of this micro-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from toolkit.distributed import gradient_divisor
from toolkit.distributed.sequence import SPMesh
from toolkit.errors import ConfigError, DataError
from toolkit.losses.step.totals import Counts, exchange_counts
from toolkit.losses.step.weights import counts_here
from toolkit.metrics import widened


def auxiliary_weights(
    num_tokens: Sequence[Tensor | int],
    *,
    gradient_reduction: Literal["mean", "sum"] = "mean",
    sp_mesh: SPMesh | None = None,
) -> list[Tensor]:
    """Return the factor of each micro-batch's term: ``n_m / N``, times R where the back-end averages over R ranks.

    n_m is the number of tokens of micro-batch m and N that of the whole step on all ranks. Summed over micro-batches
    and reduced over ranks, terms that are means over their tokens then give the mean over all tokens of the step: the
    same for every cut and every number of ranks (the R only undoes the averaging of gradients). This is exact for a
    z-loss, or any other mean of one value per token. A load-balancing loss is a product of two means over tokens, so
    its *value* depends on the cut by definition; its scale does not.

    Args:
        num_tokens: for each micro-batch of this rank, the number of tokens that its term is the mean of, a number or a
            0-dim tensor: usually ``attention_mask.sum()``, padding included where the model averages over it. 0 gives
            the factor 0; the term must then be finite, because 0 * NaN is NaN.
        gradient_reduction: what the back-end does over ranks, as in the loss config.
        sp_mesh: only where each rank of it computes the term of the whole row and its shard alone has a gradient;
            `num_tokens` are then those of the row, counted once. None where a rank's term is that of its shard.

    Returns:
        One 0-dim float64 tensor per micro-batch, without gradient. Runs one collective, which every rank must join;
        ranks may have different numbers of micro-batches, or none.

    Raises:
        ConfigError: `gradient_reduction` is neither "mean" nor "sum".
        DataError: a count is not one number, or negative; the other ranks raise, too.
    """
    if gradient_reduction not in ("mean", "sum"):
        raise ConfigError(f"gradient_reduction={gradient_reduction!r} must be 'mean' or 'sum'")
    counts: list[Tensor] = []

    def count() -> Counts:
        counts.extend(_count(index, value) for index, value in enumerate(num_tokens))
        sizes = [tokens.to(device) for tokens in counts]
        local_total = torch.stack(sizes).sum() if sizes else torch.zeros((), device=device)
        local = Counts(local_total.double().reshape(1))
        return local if counts_here(sp_mesh) else local.uncounted()

    devices = [value.device for value in num_tokens if isinstance(value, Tensor)]
    device = next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
    total = exchange_counts(count, num_numbers=1, has_tables=False, device=device).numbers[0].clamp(min=1)
    factor = gradient_divisor() if gradient_reduction == "mean" else 1
    return [tokens.to(device) * factor / total for tokens in counts]


def _count(index: int, value: Tensor | int) -> Tensor:
    tokens = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if tokens.numel() != 1 or not bool(tokens >= 0):
        raise DataError(f"num_tokens[{index}]={value!r} must be one number of tokens, 0 or more")
    return widened(tokens).reshape(())
