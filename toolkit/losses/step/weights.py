"""One weight for each token, fixed before the first forward of an optimizer step.

The weight is that of the aggregation (`functional.aggregation`) divided by its denominator over all micro-batches and
ranks. The loss is then always ``(weight * token_loss).sum()``: chunks, micro-batches, packs and ranks add up, and the
layout cannot change the gradient. A mean of micro-batch means would: with token losses [1, 1] and [3, 3, 3, 3, 3, 3] it
gives 2.0, where the mean over tokens is 2.5.

DDP and FSDP *average* gradients over R ranks, so each rank's weights carry a factor R that cancels the averaging
(``gradient_reduction="mean"``); a back-end that sums gets no factor.

Legend: B rows, T positions of a row, S sequences of a packed row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from toolkit.distributed import gradient_divisor
from toolkit.distributed.sequence import SPMesh
from toolkit.errors import ConfigError, DataError, a_type
from toolkit.functional.aggregation import Share, share
from toolkit.functional.segments import NO_SEQUENCE, sequence_ids
from toolkit.metrics import Sum

ItemT = TypeVar("ItemT")


def check_config(loss_cfg: Any, cfg_cls: type) -> None:
    """Raise `ConfigError` if the config is that of another loss."""
    if not isinstance(loss_cfg, cfg_cls):
        is_class = isinstance(loss_cfg, type)
        what = f"the class {loss_cfg.__name__}" if is_class else a_type(loss_cfg)
        hint = f"; make one: {loss_cfg.__name__}()" if is_class else ""
        raise ConfigError(f"this loss takes a {cfg_cls.__name__}, not {what}{hint}")


def checked_items(data_batches: Any, item_cls: type[ItemT]) -> list[ItemT]:
    """Return the items of a step as a list, after checking their types.

    Raises:
        DataError: `data_batches` is not a list or tuple, or an item has another type.
    """
    if not isinstance(data_batches, (list, tuple)):
        raise DataError(f"data_batches is {a_type(data_batches)}; give a list with one item for each micro-batch")
    for index, item in enumerate(data_batches):
        if not isinstance(item, item_cls):
            raise DataError(f"data_batches[{index}] is {a_type(item)}; this loss takes {item_cls.__name__}")
    return list(data_batches)


def device_of(data_batches: Any) -> torch.device:
    """Return the device of the first item of a step; the CPU if it has none."""
    first = data_batches[0] if isinstance(data_batches, (list, tuple)) and data_batches else None
    labels = getattr(first, "shifted_labels", first)
    return labels.device if isinstance(labels, Tensor) else torch.device("cpu")


def sequence_ids_of_batches(
    labels: Sequence[Tensor], cu_seq_lens_list: Sequence[Tensor | None] | None, *, ignore_idx: int = -100
) -> list[Tensor]:
    """Return the sequence that each position of each micro-batch belongs to, [1, T] or [B, T] each.

    Args:
        labels: shifted labels of each micro-batch, [1, T] or [B, T], whole rows.
        cu_seq_lens_list: [S + 1] boundaries of each packed row; None: each row is one sequence.
        ignore_idx: label of positions that are not scored.

    Raises:
        DataError: the number of boundaries is not that of micro-batches, they do not fit the row, or a scored position
            is behind the last one.
    """
    if cu_seq_lens_list is not None and len(cu_seq_lens_list) != len(labels):
        raise DataError(
            f"cu_seq_lens_list has {len(cu_seq_lens_list)} entries for {len(labels)} micro-batches; give one for each"
        )
    ids_of_batches = []
    for index, batch_labels in enumerate(labels):
        bounds = cu_seq_lens_list[index] if cu_seq_lens_list is not None else None
        ids = sequence_ids(batch_labels.shape, bounds, batch_labels.device)
        stray = (ids == NO_SEQUENCE) & (batch_labels != ignore_idx) if bounds is not None else None
        if stray is not None and bool(stray.any()):
            raise DataError(
                f"data_batches[{index}].shifted_labels{stray.nonzero()[0].tolist()} is scored, but lies behind the end "
                f"of cu_seq_lens; extend cu_seq_lens or mark the position by ignore_idx = {ignore_idx}"
            )
        ids_of_batches.append(ids)
    return ids_of_batches


def aggregated(
    is_counted: Sequence[Tensor], ids: Sequence[Tensor | None], aggregation: str, **options: Any
) -> list[Share]:
    """Return the share of every micro-batch of this rank under `aggregation`.

    Args:
        is_counted: which positions of each micro-batch count, bool, [1, T] or [B, T], whole rows.
        ids: [1, T] or [B, T] each, from `sequence_ids_of_batches`; None if the aggregation does not need sequences.
        aggregation: see `functional.aggregation`.
        options: of `functional.aggregation.share`; a list has one entry for each micro-batch.
    """
    return [
        share(
            is_active,
            batch_ids,
            aggregation,
            **{key: value[index] if isinstance(value, list) else value for key, value in options.items()},
        )
        for index, (is_active, batch_ids) in enumerate(zip(is_counted, ids, strict=True))
    ]


def count_of(shares: Sequence[Share], device: torch.device) -> Tensor:
    """Return what the micro-batches of this rank add to the denominator of one term, 0-dim float64."""
    if not shares:
        return torch.zeros((), dtype=torch.float64, device=device)
    return sum((batch.count for batch in shares[1:]), shares[0].count)


def calibrated(shares: Sequence[Share], denominator: Tensor, *, gradient_reduction: str) -> list[Tensor]:
    """Divide the weights of one term by its denominator over the whole step.

    Args:
        shares: of the micro-batches of this rank.
        denominator: the sum of `count_of` over all ranks, 0-dim.
        gradient_reduction: "mean" or "sum", what the back-end does to gradients over ranks.

    Returns:
        float64 weights, [B, T] for each micro-batch, 0 where nothing is scored.
    """
    factor = ranks_in(gradient_reduction)
    if factor != 1:
        denominator = denominator / factor
    return [batch.weights * factor if batch.is_sum else batch.divided(denominator) for batch in shares]


def counts_here(sp_mesh: SPMesh | None) -> bool:
    """Whether this rank counts the sequences that it shares with the others of its mesh."""
    return sp_mesh is None or sp_mesh.get_local_rank() == 0


def loss_metric(loss: Tensor, gradient_reduction: str) -> Sum:
    """Return a loss as a metric whose sum over micro-batches and ranks is the loss of the whole batch.

    Args:
        loss: scalar, from calibrated weights; with "mean" these carry a factor R, which is divided out here.
        gradient_reduction: "mean" or "sum", that of the weights.
    """
    factor = ranks_in(gradient_reduction)
    value = loss.detach().double()
    return Sum(value if factor == 1 else value / factor)


def ranks_in(gradient_reduction: str) -> int:
    """Return the number that the back-end divides the sum of the ranks' gradients by."""
    return gradient_divisor() if gradient_reduction == "mean" else 1
