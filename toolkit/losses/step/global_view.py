"""All tokens that a loss looks at, when they are spread over the ranks of a sequence-parallel mesh or over a step.

A rank (or micro-batch) scores only its local tokens. It computes the loss of all tokens, with the others as constants,
differentiates it by the local log-probabilities, and reports the part of the local tokens: values and gradients then
add up to those of all tokens. That takes one sum over the mesh of one number for each token and nothing in backward. It
works for every statistic that a loss takes: means, products, suffix sums, turns, maxima, or custom ones.

The others' log-probabilities come from the mesh; across micro-batches, which are not in memory at the same time, from
the items' `current_logprobs`.

Legend: B rows, T positions of a row, N tokens that are looked at, n local tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.distributed import all_gather_objects, rank, rank_of
from toolkit.distributed.sequence import SPMesh
from toolkit.errors import DataError
from toolkit.functional.segments import NO_SEQUENCE
from toolkit.head import TokenScores
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.step.item_checks import scored_labels
from toolkit.losses.step.weights import counts_here
from toolkit.metrics import Metric, Metrics, Sum

if TYPE_CHECKING:
    from toolkit.losses.kwargs import GRPOLossKwargs

NUMBERED = ("sequence_ids", "turn_ids")
"""Fields numbered from 0 in every micro-batch."""


@dataclass(frozen=True)
class GlobalView:
    """All tokens that a loss looks at, the local ones included."""

    kwargs: Any
    """`GRPOLossKwargs` of [N] tokens."""
    sp_mesh: SPMesh | None
    """The ranks with the others' log-probabilities; None: they are in ``kwargs.current_logprobs``."""
    reports: bool
    """Whether this rank (and micro-batch) reports the metrics of the loss: only one does."""

    def to(self, device: torch.device | str) -> GlobalView:
        """Return a copy with every tensor on `device`."""
        return replace(self, kwargs=self.kwargs.to(device))

    def scores(self, logprobs: Tensor, entropy: Tensor | None, view_index: Tensor) -> TokenScores:
        """Return the scores of all tokens [N], those of others without gradient; all of the mesh must call it together.

        `logprobs` [n] and, if the loss looks at them, `entropy` [n] are those of the local tokens, and `view_index` [n]
        their indices among the N.

        Raises:
            DataError: the loss needs entropies of other micro-batches: items do not carry them.
        """
        if self.sp_mesh is not None:
            full_entropy = None if entropy is None else self._summed(entropy, view_index)
            return TokenScores(self._summed(logprobs, view_index).index_copy(0, view_index, logprobs), full_entropy)
        if entropy is not None:
            raise DataError(
                "this loss looks at entropies of the whole step, which items do not carry; use one micro-batch on one "
                "rank, without current_logprobs"
            )
        others = self.kwargs.current_logprobs.to(logprobs.dtype)
        return TokenScores(others.index_copy(0, view_index, logprobs), None)

    def _summed(self, local_values: Tensor, view_index: Tensor) -> Tensor:
        assert self.sp_mesh is not None
        full_values = local_values.new_zeros(len(self.kwargs.shifted_labels))
        full_values = full_values.index_copy(0, view_index, local_values.detach())
        dist.all_reduce(full_values, group=self.sp_mesh.get_group())
        return full_values


class _ValueAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Return `value` with the gradient of `source`, both [] (``value + source - sg(source)``, also for inf)."""
    return _ValueAndGradient.apply(value, source)


def emptied(metrics: Metrics) -> dict[str, Metric]:
    """Return the same metrics with nothing measured, for a rank whose part another one reports."""
    nothing = torch.zeros(0, dtype=torch.float64)
    return {
        name: Sum(torch.zeros_like(metric.total)) if isinstance(metric, Sum) else type(metric).of(nothing)  # type: ignore[attr-defined]
        for name, metric in metrics.items()
    }


def with_global_views(
    batches: list[GRPOLossKwargs],
    cfg: BaseRLLossConfig,
    sp_mesh: SPMesh | None,
    *,
    is_wide: bool,
    is_step_wide: bool,
) -> list[GRPOLossKwargs]:
    """Return the kwargs of whole rows with a `GlobalView` each, if the tokens that their loss looks at are spread.

    With `is_wide` the loss looks at other shards of `sp_mesh`; with `is_step_wide` at all micro-batches and ranks, and
    then all must call it together.
    """
    if not (is_wide or is_step_wide):
        return [
            batch if batch.group_ids is None else batch.replace(group_ids=_from_zero(batch.group_ids))
            for batch in batches
        ]
    batches = [batch.replace(shifted_labels=scored_labels(batch, cfg)) for batch in batches]
    parts = [batch.take(_scored(batch, cfg)) for batch in batches]
    if is_step_wide:
        step_kwargs, indices, first = _step(parts, sp_mesh)
        reports = counts_here(sp_mesh) and first == 0  # some ranks may have no micro-batch
        views = [GlobalView(step_kwargs, None, reports and index == 0) for index in range(len(batches))]
    else:
        indices = [torch.arange(len(part.shifted_labels), device=part.shifted_labels.device) for part in parts]
        views = [
            GlobalView(part.replace(group_ids=_from_zero(part.group_ids)), sp_mesh, counts_here(sp_mesh))
            for part in parts
        ]
    return [
        batch.replace(view_index=_spread(index, _scored(batch, cfg), batch.shifted_labels), global_view=view)
        for batch, index, view in zip(batches, indices, views, strict=True)
    ]


def _scored(kwargs: GRPOLossKwargs, cfg: BaseRLLossConfig) -> Tensor:
    return (kwargs.shifted_labels != cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1)


def _spread(view_index: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return the [n] indices at their positions, -1 elsewhere, in the shape of the labels."""
    flat = torch.full((labels.numel(),), -1, dtype=torch.int64, device=labels.device)
    return flat.index_copy(0, positions, view_index).reshape(labels.shape)


def _from_zero(group_ids: Tensor | None) -> Tensor | None:
    """Number groups from 0, so a sum over groups has one entry for each group."""
    return None if group_ids is None else group_ids.unique(return_inverse=True)[1].reshape(group_ids.shape)


# -------------------------------------------------------------------- the whole step


def _step(parts: Sequence[GRPOLossKwargs], sp_mesh: SPMesh | None) -> tuple[GRPOLossKwargs | None, list[Tensor], int]:
    """Return all tokens of the step in an order that does not depend on the layout, and where to find each micro-batch.

    The order is by content: a loss that draws tokens at random must draw the same ones however the step is split.
    Without micro-batches there are no kwargs. Last comes the number of micro-batches of lower ranks.
    """
    local_batches = [{name: value.cpu() for name, value in part.tensors()} for part in parts]
    gathered = all_gather_objects(local_batches if counts_here(sp_mesh) else [])
    source = rank() if sp_mesh is None else rank_of(dist.get_global_rank(sp_mesh.get_group(), 0))
    batches = [batch for rank_batches in gathered for batch in rank_batches]
    first = sum(len(rank_batches) for rank_batches in gathered[:source])
    names = list({name: None for batch in batches for name in batch})
    if not parts:
        return None, [], first  # nothing will look at it
    numbered = [_filled(batch, names) for batch in _numbered_on(batches)]
    joined = {name: torch.cat([batch[name] for batch in numbered]) for name in names}
    order = _by_content(joined)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    ends = torch.tensor([0, *(len(batch["shifted_labels"]) for batch in batches)]).cumsum(0).tolist()
    device = parts[0].shifted_labels.device
    indices = [inverse[ends[first + i] : ends[first + i + 1]].to(device) for i in range(len(parts))]
    fields = {name: value[order].to(device) for name, value in joined.items()}
    if "group_ids" in fields:
        fields["group_ids"] = fields["group_ids"].unique(return_inverse=True)[1]
    return parts[0].replace(**fields), indices, first


def _numbered_on(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return the micro-batches with sequences and turns numbered consecutively, so no two share a number."""
    numbered, starts = [], dict.fromkeys(NUMBERED, 0)
    for fields in batches:
        fields = dict(fields)
        for name in NUMBERED:
            if name in fields:
                highest = int(fields[name].max()) + 1 if len(fields[name]) else 0
                fields[name] = fields[name] + starts[name]
                starts[name] += highest
        numbered.append(fields)
    return numbered


def _filled(fields: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return a micro-batch with defaults for fields that only others have: on-policy, unreported, unweighted.

    A field without a default raises on every rank, because all have all micro-batches here.
    """
    current = fields["current_logprobs"]
    defaults = {
        "old_logprobs": current,
        "rollout_logprobs": torch.full_like(current, torch.nan),
        "importance": torch.ones(len(current), dtype=torch.float64),
        "group_ids": torch.full((len(current),), NO_SEQUENCE),
    }
    for name in names:
        if name not in fields and name not in defaults:
            raise DataError(f"some micro-batches of this step have {name}, others lack it; give it to all or to none")
    return {name: fields[name] if name in fields else defaults[name] for name in names}


def _by_content(fields: dict[str, Tensor]) -> Tensor:
    """Return an order of the tokens, [N]: sequences by a hash of their tokens, the tokens of a sequence as they are.

    Sequences of equal tokens and advantages are ordered by their probability. The hash does not include it, because its
    bits differ by rounding between layouts.
    """
    ids = fields["sequence_ids"]
    num = int(ids.max()) + 1 if len(ids) else 0
    starts = torch.full((num,), len(ids)).scatter_reduce(0, ids, torch.arange(len(ids)), "amin")
    within = torch.arange(len(ids)) - starts[ids]
    groups = fields["group_ids"] if "group_ids" in fields else torch.zeros_like(ids)
    key = _mixed(_mixed(_mixed(_mixed(fields["shifted_labels"]) + within) + groups) + _bits(fields["advantages"]))
    of_sequence = torch.zeros(num, dtype=torch.int64).index_add(0, ids, key)  # wraps around, the same in any order
    likelihood = torch.zeros(num, dtype=torch.float64).index_add(0, ids, fields["current_logprobs"].double())
    order = likelihood.argsort(stable=True)
    order = order[of_sequence[order].argsort(stable=True)]
    number = torch.empty_like(order)
    number[order] = torch.arange(num)
    return torch.argsort(number[ids], stable=True)


def _bits(values: Tensor) -> Tensor:
    return (values.double() + 0.0).view(torch.int64)  # -0.0 becomes 0.0


def _mixed(values: Tensor) -> Tensor:
    """Scatter int64 numbers over their range (the finaliser of splitmix64, with signed shifts)."""
    values = (values ^ (values >> 30)) * -4658895280553007687
    values = (values ^ (values >> 27)) * -7723592293110705685
    return values ^ (values >> 31)
