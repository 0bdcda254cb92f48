"""One weight for each token, fixed before the first forward of an optimizer step.

The weight is the aggregation's own (`functional.aggregation`) divided by its denominator over all micro-batches and all
ranks. The loss is then always ``(weight * token_loss).sum()``: chunks, micro-batches, packs and ranks compose by
addition, and no layout can change the gradient. A mean of micro-batch means would: with token losses [1, 1] and
[3, 3, 3, 3, 3, 3] it gives 2.0, where the mean over tokens is 2.5.

DDP and FSDP *average* gradients over R ranks, so each rank's weights carry a factor R that the averaging takes out
again (``gradient_reduction="mean"``); a back-end that sums gets no factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import all_gather_objects, all_reduce_sum, rank, sp_gather, sp_split, world_size
from toolkit.errors import ConfigError, DataError
from toolkit.functional.aggregation import Share, share
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


@dataclass(frozen=True)
class Calibrated:
    """The weights of one term of the loss, and what they were divided by."""

    weights: list[Tensor]
    """float64, [B, T] for each micro-batch, 0 where nothing is scored."""
    denominators: Tensor
    """[2] float64, over all micro-batches and ranks: of the first and (per_component) of the second component."""


def calibrated(
    terms: Sequence[Sequence[Share]], *, gradient_reduction: str = "mean", counted_here: bool = True
) -> list[Calibrated]:
    """Divide the weights of each term by its denominators over the whole step; all ranks must call it together.

    Args:
        terms: for each term of the loss the shares of all micro-batches of this rank.
        gradient_reduction: "mean" or "sum", what the back-end does over ranks.
        counted_here: False where another rank of a sequence-parallel mesh counts the same sequences.

    Returns:
        For each term its weights; one collective for all of them.
    """
    device = next((own.counts.device for shares in terms for own in shares), torch.device("cpu"))
    zero = torch.zeros(2, dtype=torch.float64, device=device)
    local = torch.stack([sum((own.counts for own in shares), zero) for shares in terms])
    totals = all_reduce_sum(local if counted_here else torch.zeros_like(local))
    factor = world_size() if gradient_reduction == "mean" else 1
    return [
        Calibrated(
            [own.weights * factor if own.is_sum else own.divided(total / factor) for own in shares],
            torch.ones_like(total) if any(own.is_sum for own in shares) else total,
        )
        for shares, total in zip(terms, totals, strict=True)
    ]


def aggregated(
    labels: Sequence[Tensor],
    ids: Sequence[Tensor],
    aggregation: str,
    *,
    ignore_idx: int,
    sp_mesh: DeviceMesh | None = None,
    **options: Any,
) -> list[Share]:
    """Return the share of every micro-batch of this rank under `aggregation`.

    Args:
        labels: shifted labels of each micro-batch, [1, T] or [B, T]; shards under sequence parallelism.
        ids: from `sequence_ids_of_batches`.
        aggregation: see `functional.aggregation`.
        ignore_idx: label of positions that are not scored.
        sp_mesh: ranks that share a sequence; sequences are then measured over the whole mesh, and every rank of it
            counts all of them (pass ``counted_here`` to `calibrated`).
        options: of `functional.aggregation.share`; a list has one entry for each micro-batch.
    """
    found = []
    for index, (own, own_ids) in enumerate(zip(labels, ids, strict=True)):
        own_options = {key: value[index] if isinstance(value, list) else value for key, value in options.items()}
        is_active = own != ignore_idx
        if sp_mesh is None:
            found.append(share(is_active, own_ids, aggregation, **own_options))
            continue
        gathered: dict[str, Any] = {
            key: sp_gather(value.to(torch.float64), sp_mesh).to(value.dtype) if isinstance(value, Tensor) else value
            for key, value in own_options.items()
        }
        everywhere = sp_gather(is_active.to(torch.uint8), sp_mesh).bool()  # not every back-end gathers booleans
        whole = share(everywhere, sp_gather(own_ids, sp_mesh), aggregation, **gathered)
        is_second = own_options["is_positive"].logical_not() if whole.is_second is not None else None
        weights = sp_split(whole.weights, sp_mesh, pad=0.0)
        found.append(Share(weights, whole.counts, is_sum=whole.is_sum, is_second=is_second))
    return found


def counts_here(sp_mesh: DeviceMesh | None) -> bool:
    """Whether this rank counts the sequences that it shares with the others of its mesh."""
    return sp_mesh is None or sp_mesh.get_local_rank() == 0


def prompts_of_batches(
    labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int, count_empty: bool
) -> tuple[list[Tensor], list[int]]:
    """Count the scored tokens of every prompt over all micro-batches and ranks.

    Returns:
        For each micro-batch the tokens of each position's prompt ([B, T]), and the number of prompts that it is to
        count: each prompt is counted by one micro-batch of one rank.
    """
    own: dict[int, int] = {}
    for own_labels, own_groups in zip(labels, group_ids, strict=True):
        groups, place = own_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.bincount(place, (own_labels.reshape(-1) != ignore_idx).double(), minlength=len(groups))
        for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            own[group] = own.get(group, 0) + int(size)
    everyone = all_gather_objects(own)
    total: dict[int, int] = {}
    for counts in everyone:
        for group, size in counts.items():
            total[group] = total.get(group, 0) + size
    mine = {group for group in own if all(group not in earlier for earlier in everyone[: rank()])}
    tokens, numbers = [], []
    for own_groups in group_ids:
        groups, place = own_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.tensor([total[group] for group in groups.tolist()], dtype=torch.float64, device=place.device)
        tokens.append(sizes[place].reshape(own_groups.shape))
        # Negative numbers are the padding of a packed row.
        named = {group for group in groups.tolist() if group in mine and group >= 0}
        counted = {group for group in named if count_empty or total[group] > 0}
        numbers.append(len(counted))
        mine -= counted
    return tokens, numbers


def loss_metric(loss: Tensor, gradient_reduction: str) -> Sum:
    """Return a loss as a metric whose sum over micro-batches and ranks is the loss of the whole batch.

    Args:
        loss: scalar, from calibrated weights; with "mean" these carry a factor R, which is taken out here.
        gradient_reduction: "mean" or "sum", as the weights were made.
    """
    return Sum(loss.detach().double() / (world_size() if gradient_reduction == "mean" else 1))
