"""Turn values of tokens into a loss: ``sum over terms of coef * sum over tokens of weight * value``.

Legend: n tokens of one call, [1, T] or [B, T] of a micro-batch, K columns of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.config.term import LossTerm, weight_columns
from toolkit.losses.step.weights import loss_metric
from toolkit.metrics import Metric


def weights_of(terms: Sequence[LossTerm], loss_kwargs: Any) -> Iterator[tuple[LossTerm, Tensor]]:
    """Yield each term with its weights, [B, T] or [n], the shape of the labels in `loss_kwargs`.

    Args:
        terms: all terms of the loss; which column a term reads depends on the others.
        loss_kwargs: with the weights.
    """
    for term, column in zip(terms, weight_columns(terms), strict=True):
        columns = loss_kwargs.term_weights
        yield term, loss_kwargs.loss_weight if columns is None else columns[..., column]


def term_sums(
    terms: Sequence[LossTerm],
    values: Mapping[str, Tensor],
    loss_kwargs: Any,
    importance: Tensor | None = None,
    *,
    owner: str,
    partly: bool = False,
) -> dict[str, Tensor]:
    """Return the weighted sum of every term, 0-dim, without its coefficient.

    Args:
        terms: of the loss.
        values: [n] of each term by its name, unreduced.
        loss_kwargs: the kwargs of these tokens.
        importance: [n] factor of the terms with ``use_correction``; None: that of the kwargs.
        owner: name of the class that returned the values, for messages.
        partly: sum only the terms that have values.

    Raises:
        DataError: values of a term are missing or not one per token, or the kwargs have no weights.
    """
    if loss_kwargs.loss_weight is None:
        raise DataError(
            f"{type(loss_kwargs).__name__} has no loss_weight; build it with {owner}.build_batches_loss_kwargs"
        )
    if not partly and values.keys() != {term.name for term in terms}:
        raise DataError(
            f"{owner} returned values of {sorted(values)}, but its terms are {sorted(term.name for term in terms)}; "
            "return one tensor [n] for each"
        )
    importance = loss_kwargs.importance if importance is None else importance
    return {
        term.name: _weighted_sum(term, weights, values[term.name], importance, owner)
        for term, weights in weights_of(terms, loss_kwargs)
        if term.name in values
    }


def _weighted_sum(term: LossTerm, weights: Tensor, values: Tensor, importance: Tensor | None, owner: str) -> Tensor:
    if not isinstance(values, Tensor) or not values.is_floating_point() or values.shape != weights.shape:
        returned = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise DataError(
            f"{owner} returned {returned} for term {term.name!r}; return the value of each token, "
            f"{list(weights.shape)} floating-point, without a mean or sum"
        )
    weights = as_loss_dtype(weights, values)
    if importance is not None and term.use_correction:
        weights = weights * as_loss_dtype(importance, values)
    elif term.token_filter is None:
        return (weights * values).sum()
    # Values of tokens that do not count become 0 first: they may be inf, and inf * 0 is NaN.
    return (weights * values.where(weights != 0, 0.0)).sum()


def weighted(terms: Sequence[LossTerm], sums: Mapping[str, Tensor]) -> Tensor:
    """Return the `sums` of some terms, 0-dim as in `term_sums`, each times its coefficient, as one number, 0-dim."""
    first, *others = (sums[term.name] if term.coef == 1 else term.coef * sums[term.name] for term in terms)
    return sum(others, first)


def total(
    terms: Sequence[LossTerm], sums: Mapping[str, Tensor], gradient_reduction: str
) -> tuple[Tensor, dict[str, Metric]]:
    """Return the loss from the sums of its terms; as metrics the loss and, if there are several terms, their sums.

    `sums` are 0-dim, as in `term_sums`, and so is the loss.
    """
    loss = weighted(terms, sums)
    parts: dict[str, Metric] = {}
    if len(terms) > 1:
        parts = {f"{term.name}_loss": loss_metric(sums[term.name], gradient_reduction) for term in terms}
    return loss, {**parts, "loss": loss_metric(loss, gradient_reduction)}


def has_weight(terms: Sequence[LossTerm], loss_kwargs: Any) -> Tensor:
    """Return which tokens have a weight in some term whose coefficient is not 0, bool, [B, T] or [n] as the labels."""
    is_weighted = torch.zeros_like(loss_kwargs.shifted_labels, dtype=torch.bool)
    for term, weights in weights_of(terms, loss_kwargs):
        if term.coef == 0:
            continue
        counts = weights != 0
        if term.use_correction and loss_kwargs.importance is not None:
            counts = counts & (loss_kwargs.importance != 0)
        is_weighted |= counts
    return is_weighted


def as_loss_dtype(weights: Tensor, token_losses: Tensor) -> Tensor:
    """Return fp64 calibration `weights` [n] in the dtype of `token_losses` [n], fp32 or wider."""
    return weights.to(torch.promote_types(token_losses.dtype, torch.float32))
