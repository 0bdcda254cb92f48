"""Additive terms of the model itself, such as a router's loss or a z-loss, beside the loss of this package.

A policy loss comes calibrated: each micro-batch gives its share of the whole step. A model's own term comes as a *mean*
over the tokens that one forward saw, so that adding it as it is makes it grow with the number of micro-batches, and
multiplying it with the loss's factor for DDP makes it grow with the world (huggingface/transformers#48706).

    loss = context.forward(...)[0] + router_coef * weight * output.aux_loss      # weight: of this micro-batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import world_size
from toolkit.errors import ConfigError, DataError
from toolkit.losses.step.totals import Counts, census
from toolkit.losses.step.weights import counts_here
from toolkit.metrics import widened


def auxiliary_weights(
    num_tokens: Sequence[Tensor | int],
    *,
    gradient_reduction: Literal["mean", "sum"] = "mean",
    sp_mesh: DeviceMesh | None = None,
) -> list[Tensor]:
    """Return the factor of each micro-batch's term: ``n_m / N``, times R where the back-end averages over R ranks.

    n_m are the tokens of micro-batch m and N those of the whole step on all ranks. Summed over micro-batches and
    reduced over ranks, terms that are means over their tokens then give the mean over all tokens of the step: the same
    for every cut and every number of ranks (the R only undoes the averaging of gradients). That is exact for a z-loss,
    or whatever else is a mean of one value a token. A load-balancing loss is a product of two means over tokens, so
    that its *value* depends on the cut by its own definition; its scale does not.

    Args:
        num_tokens: for each micro-batch of this rank how many tokens its term is the mean of, as numbers or 0-dim
            tensors: ``attention_mask.sum()`` mostly, padding included where the model averages over it. 0 gives the
            factor 0; the term must then be finite, for 0 * NaN is NaN.
        gradient_reduction: what the back-end does over ranks, as in the loss config.
        sp_mesh: only where each rank of it computes the term of the whole row with its own tokens alone live;
            `num_tokens` are then those of the row, and counted once. None where a rank's term is that of its shard.

    Returns:
        One 0-dim float64 tensor a micro-batch, without gradient; one collective for all of them, which every rank must
        take part in. A rank may have other micro-batches than the rest, or none.

    Raises:
        ConfigError: `gradient_reduction` is neither "mean" nor "sum".
        DataError: a count is not one number, or negative; on the other ranks, that it is so on this one.
    """
    if gradient_reduction not in ("mean", "sum"):
        raise ConfigError(f"gradient_reduction={gradient_reduction!r} must be 'mean' or 'sum'")
    counts: list[Tensor] = []

    def count() -> Counts:
        counts.extend(_count(index, given) for index, given in enumerate(num_tokens))
        own = torch.stack([found.to(device) for found in counts]).sum() if counts else torch.zeros((), device=device)
        found = Counts(own.double().reshape(1))
        return found if counts_here(sp_mesh) else found.uncounted()

    places = [given.device for given in num_tokens if isinstance(given, Tensor)]
    device = next((place for place in places if place.type != "cpu"), torch.device("cpu"))
    total = census(count, num_numbers=1, has_tables=False, device=device).numbers[0].clamp(min=1)
    factor = world_size() if gradient_reduction == "mean" else 1
    return [found.to(device) * factor / total for found in counts]


def _count(index: int, given: Tensor | int) -> Tensor:
    found = given if isinstance(given, Tensor) else torch.tensor(float(given), dtype=torch.float64)
    if found.numel() != 1 or not bool(found >= 0):
        raise DataError(f"num_tokens[{index}]={given!r} must be one number of tokens, 0 or more")
    return widened(found).reshape(())
