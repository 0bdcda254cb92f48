"""One weight for each token, fixed before the first forward of an optimizer step.

The weight is the aggregation mode's own (`functional.aggregation`) divided by its sum over all micro-batches and all
ranks. The loss is then always ``(weight * token_loss).sum()``: chunks, micro-batches, packs and ranks compose by
addition, and no layout can change the gradient. A mean of micro-batch means would: with token losses [1, 1] and
[3, 3, 3, 3, 3, 3] it gives 2.0, where the mean over tokens is 2.5.

DDP and FSDP *average* gradients over R ranks, so each rank's weights carry a factor R that the averaging takes out
again (``gradient_reduction="mean"``); a back-end that sums gets no factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import all_reduce_sum, sp_gather, sp_split, world_size
from toolkit.errors import ConfigError, DataError
from toolkit.functional.aggregation import token_weights
from toolkit.functional.segments import NO_SEQUENCE, sequence_ids
from toolkit.metrics import Sum

ItemT = TypeVar("ItemT")


def checked_items(data_batches: Any, item_type: type[ItemT], loss_cfg: Any, cfg_type: type) -> list[ItemT]:
    """Return the items of a step as a list, after a look at their type and at that of the config.

    Raises:
        DataError: it is no list or tuple, or an item is of another kind.
        ConfigError: the config is that of another loss.
    """
    if not isinstance(loss_cfg, cfg_type):
        raise ConfigError(f"this loss takes a {cfg_type.__name__}, not a {type(loss_cfg).__name__}")
    if not isinstance(data_batches, (list, tuple)):
        raise DataError(
            f"data_batches is a {type(data_batches).__name__}; give a list with one item for each micro-batch"
        )
    for index, item in enumerate(data_batches):
        if not isinstance(item, item_type):
            raise DataError(f"data_batches[{index}] is a {type(item).__name__}; this loss takes {item_type.__name__}")
    return list(data_batches)


def sequence_ids_of_batches(
    labels: Sequence[Tensor],
    cu_seq_lens_list: Sequence[Tensor | None] | None,
    sp_mesh: DeviceMesh | None = None,
    *,
    ignore_idx: int = -100,
) -> list[Tensor]:
    """Return the sequence that each position of each micro-batch belongs to, [1, T] or [B, T] each.

    Args:
        labels: shifted labels of each micro-batch; this rank's shards under sequence parallelism.
        cu_seq_lens_list: boundaries of each packed row, over the whole row; None: each row is one sequence.
        sp_mesh: ranks that share a sequence.
        ignore_idx: label of positions that are not scored.

    Raises:
        DataError: there are not as many boundaries as micro-batches, they do not fit the row, or a scored position
            lies behind the last one.
    """
    if cu_seq_lens_list is not None and len(cu_seq_lens_list) != len(labels):
        raise DataError(
            f"cu_seq_lens_list has {len(cu_seq_lens_list)} entries for {len(labels)} micro-batches; give one for each"
        )
    shards = sp_mesh.size() if sp_mesh is not None else 1
    found = []
    for index, own in enumerate(labels):
        whole = torch.Size([*own.shape[:-1], own.shape[-1] * shards])
        bounds = cu_seq_lens_list[index] if cu_seq_lens_list is not None else None
        ids = sequence_ids(whole, bounds, own.device)
        found.append(sp_split(ids, sp_mesh, pad=NO_SEQUENCE) if sp_mesh is not None else ids)
        stray = (found[-1] == NO_SEQUENCE) & (own != ignore_idx)
        if bool(stray.any()):
            raise DataError(
                f"data_batches[{index}].shifted_labels{stray.nonzero()[0].tolist()} is scored, but lies behind the end "
                f"of cu_seq_lens; extend cu_seq_lens or mark the position by ignore_idx = {ignore_idx}"
            )
    return found


def calibrated_weights(
    labels: Sequence[Tensor],
    ids: Sequence[Tensor],
    *,
    mode: str,
    ignore_idx: int,
    gradient_reduction: str = "mean",
    sp_mesh: DeviceMesh | None = None,
) -> list[Tensor]:
    """Return the weight of every token of every micro-batch of this rank; all ranks must call it together.

    Args:
        labels: shifted labels of each micro-batch, [1, T] or [B, T]; shards under sequence parallelism.
        ids: from `sequence_ids_of_batches`.
        mode: aggregation, see `functional.aggregation`.
        ignore_idx: label of positions that are not scored.
        gradient_reduction: "mean" or "sum", what the back-end does over ranks.
        sp_mesh: ranks that share a sequence; sequences are then measured over the whole mesh.

    Returns:
        float64 tensors of the labels' shapes, 0 where ignored. They sum to 1 over all micro-batches and ranks (to R
        with "mean"), or to 0 when no token is scored anywhere.
    """
    raw = [_raw_weights(own != ignore_idx, own_ids, mode, sp_mesh) for own, own_ids in zip(labels, ids, strict=True)]
    device = labels[0].device if labels else torch.device("cpu")
    local = torch.stack([weights.sum() for weights in raw]).sum() if raw else torch.zeros((), dtype=torch.float64)
    denominator = all_reduce_sum(local.to(device))
    factor = world_size() if gradient_reduction == "mean" else 1
    scale = torch.where(denominator > 0, factor / denominator, 0.0)
    return [weights * scale for weights in raw]


def _raw_weights(is_active: Tensor, ids: Tensor, mode: str, sp_mesh: DeviceMesh | None) -> Tensor:
    if sp_mesh is None or mode == "token":
        return token_weights(is_active, ids, mode)
    everywhere = sp_gather(is_active.to(torch.uint8), sp_mesh).bool()  # not every back-end gathers booleans
    whole = token_weights(everywhere, sp_gather(ids, sp_mesh), mode)
    return sp_split(whole, sp_mesh, pad=0.0)


def loss_metric(loss: Tensor, gradient_reduction: str) -> Sum:
    """Return a loss as a metric whose sum over micro-batches and ranks is the loss of the whole batch.

    Args:
        loss: scalar, from calibrated weights; with "mean" these carry a factor R, which is taken out here.
        gradient_reduction: "mean" or "sum", as the weights were made.
    """
    return Sum(loss.detach().double() / (world_size() if gradient_reduction == "mean" else 1))
