"""What a loss of wider scope looks at when its tokens are spread: a row cut by sequence parallelism, a step cut by all.

A rank (or micro-batch) scores its own tokens only. It computes the loss of all tokens together, those of others as
constants, differentiates it by its own log-probabilities, and reports the part of its own tokens: values and gradients
then add up to those of the whole. That takes one sum over the mesh of one number a token and nothing in backward, and
serves whatever statistic a loss takes: means, products, suffix sums, turns, maxima, or some of its author's own.

The others' log-probabilities come from the mesh; across micro-batches, where they are not yet or no longer there, from
the items' `current_logprobs`.

Legend: B rows, T positions of a row, N tokens that are looked at, n own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import all_gather_objects, rank, rank_of
from toolkit.errors import DataError
from toolkit.functional.segments import NO_SEQUENCE
from toolkit.head import TokenScores
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.step.item_checks import scored_labels
from toolkit.losses.step.weights import counts_here
from toolkit.metrics import Metric, Sum

if TYPE_CHECKING:
    from toolkit.losses.kwargs import GRPOLossKwargs

NUMBERED = ("sequence_ids", "turn_ids")
"""Fields that count from 0 in every micro-batch."""


@dataclass(frozen=True)
class Whole:
    """The tokens that a loss looks at, its own among them."""

    kwargs: Any
    """`GRPOLossKwargs` of [N] tokens."""
    sp_mesh: DeviceMesh | None
    """Where the others' log-probabilities are; None: in ``kwargs.current_logprobs``."""
    reports: bool
    """Whether this rank (and micro-batch) reports what the loss says of itself: once is enough."""

    def to(self, device: torch.device | str) -> Whole:
        """Return a copy with every tensor on `device`."""
        return replace(self, kwargs=self.kwargs.to(device))

    def scores(self, logprobs: Tensor, entropy: Tensor | None, place: Tensor) -> TokenScores:
        """Return the scores of all tokens [N], those of others without gradient; all of the mesh must call it together.

        Args:
            logprobs: [n] of own tokens.
            entropy: [n] the same, if the loss looks at entropies.
            place: [n] int64, where own tokens stand among the N.

        Raises:
            DataError: entropies of other micro-batches are wanted: items carry none.
        """
        if self.sp_mesh is not None:
            others = self._summed(logprobs, place)
            return TokenScores(
                others.index_copy(0, place, logprobs), None if entropy is None else self._summed(entropy, place)
            )
        if entropy is not None:
            raise DataError(
                "this loss looks at entropies of the whole step, which items do not carry; use one micro-batch on one "
                "rank, without current_logprobs"
            )
        others = self.kwargs.current_logprobs.to(logprobs.dtype)
        return TokenScores(others.index_copy(0, place, logprobs), None)

    def _summed(self, own: Tensor, place: Tensor) -> Tensor:
        assert self.sp_mesh is not None
        everyone = own.new_zeros(len(self.kwargs.shifted_labels)).index_copy(0, place, own.detach())
        dist.all_reduce(everyone, group=self.sp_mesh.get_group())
        return everyone


class _ValueAndGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, source: Tensor) -> Tensor:
        return value.detach().clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def with_gradient_of(value: Tensor, source: Tensor) -> Tensor:
    """Return the number `value` with the gradient of `source` (``value + source - sg(source)`` that survives inf)."""
    return _ValueAndGradient.apply(value, source)


def emptied(metrics: dict[str, Metric]) -> dict[str, Metric]:
    """Return the same metrics with nothing measured, for a rank whose share another one reports."""
    nothing = torch.zeros(0, dtype=torch.float64)
    return {
        name: Sum(torch.zeros_like(metric.total)) if isinstance(metric, Sum) else type(metric).of(nothing)  # type: ignore[attr-defined]
        for name, metric in metrics.items()
    }


def with_whole(
    batches: list[GRPOLossKwargs], cfg: BaseRLLossConfig, sp_mesh: DeviceMesh | None, *, is_step_wide: bool
) -> list[GRPOLossKwargs]:
    """Return the kwargs of whole rows with the tokens that their loss looks at, where these are spread.

    Args:
        batches: kwargs of whole rows.
        cfg: of the loss.
        sp_mesh: ranks that share a sequence.
        is_step_wide: whether the loss looks at all micro-batches and ranks; all must call it together then.
    """
    if cfg.scope == "token" or (sp_mesh is None and not is_step_wide):
        return [own if own.group_ids is None else own.replace(group_ids=_from_zero(own.group_ids)) for own in batches]
    batches = [own.replace(shifted_labels=scored_labels(own, cfg)) for own in batches]
    parts = [own.take(_scored(own, cfg)) for own in batches]
    if is_step_wide:
        whole, places, first = _step(parts, sp_mesh)
        reports = counts_here(sp_mesh) and first == 0  # some ranks may have no micro-batch
        shared = [Whole(whole, None, reports and index == 0) for index in range(len(batches))]
    else:
        places = [torch.arange(len(own.shifted_labels), device=own.shifted_labels.device) for own in parts]
        shared = [
            Whole(own.replace(group_ids=_from_zero(own.group_ids)), sp_mesh, counts_here(sp_mesh)) for own in parts
        ]
    return [
        own.replace(place=_spread(place, _scored(own, cfg), own.shifted_labels), whole=seen)
        for own, place, seen in zip(batches, places, shared, strict=True)
    ]


def _scored(kwargs: GRPOLossKwargs, cfg: BaseRLLossConfig) -> Tensor:
    return (kwargs.shifted_labels != cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1)


def _spread(place: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return [n] places at their positions, -1 elsewhere, in the shape of the labels."""
    flat = torch.full((labels.numel(),), -1, dtype=torch.int64, device=labels.device)
    return flat.index_copy(0, positions, place).reshape(labels.shape)


def _from_zero(group_ids: Tensor | None) -> Tensor | None:
    """Number groups from 0, so that sums over them need no more room than there are groups."""
    return None if group_ids is None else group_ids.unique(return_inverse=True)[1].reshape(group_ids.shape)


# -------------------------------------------------------------------- the whole step


def _step(
    parts: Sequence[GRPOLossKwargs], sp_mesh: DeviceMesh | None
) -> tuple[GRPOLossKwargs | None, list[Tensor], int]:
    """Return all tokens of the step in an order that no layout changes, and where those of each micro-batch stand.

    Besides: how many micro-batches of other ranks come before this one's.

    The order is by content: a loss that draws tokens at random must draw the same ones however the step is cut.
    """
    mine = [{name: value.cpu() for name, value in own.tensors()} for own in parts]
    everyone = all_gather_objects(mine if counts_here(sp_mesh) else [])
    source = rank() if sp_mesh is None else rank_of(dist.get_global_rank(sp_mesh.get_group(), 0))
    batches = [own for batches in everyone for own in batches]
    first = sum(len(batches) for batches in everyone[:source])
    everything = list({name: None for own in batches for name in own})
    if not parts:
        return None, [], first  # nothing will look at it
    numbered = [_filled(own, everything) for own in _numbered_on(batches)]
    joined = {name: torch.cat([own[name] for own in numbered]) for name in everything}
    order = _by_content(joined)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(len(order))
    ends = torch.tensor([0, *(len(own["shifted_labels"]) for own in batches)]).cumsum(0).tolist()
    device = parts[0].shifted_labels.device
    places = [inverse[ends[first + i] : ends[first + i + 1]].to(device) for i in range(len(parts))]
    fields = {name: value[order].to(device) for name, value in joined.items()}
    if "group_ids" in fields:
        fields["group_ids"] = fields["group_ids"].unique(return_inverse=True)[1]
    return parts[0].replace(**fields), places, first


def _numbered_on(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Return micro-batches whose sequences and turns are numbered on, so that no two share one."""
    found, starts = [], dict.fromkeys(NUMBERED, 0)
    for own in batches:
        own = dict(own)
        for name in NUMBERED:
            if name in own:
                highest = int(own[name].max()) + 1 if len(own[name]) else 0
                own[name] = own[name] + starts[name]
                starts[name] += highest
        found.append(own)
    return found


def _filled(own: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Return a micro-batch with the fields that only others have: on-policy, unreported, unweighted.

    Raises:
        DataError: a field cannot be made up; on every rank alike, for all have all micro-batches here.
    """
    current = own["current_logprobs"]
    made_up = {
        "old_logprobs": current,
        "rollout_logprobs": torch.full_like(current, torch.nan),
        "importance": torch.ones(len(current), dtype=torch.float64),
        "group_ids": torch.full((len(current),), NO_SEQUENCE),
    }
    for name in names:
        if name not in own and name not in made_up:
            raise DataError(f"some micro-batches of this step have {name}, others lack it; give it to all or to none")
    return {name: own[name] if name in own else made_up[name] for name in names}


def _by_content(fields: dict[str, Tensor]) -> Tensor:
    """Return an order of the tokens, [N]: sequences by a number made of their tokens, tokens inside as they stand.

    Sequences of equal tokens and advantages stand in the order of their probability; no bits of it enter the number,
    for these differ by rounding between layouts.
    """
    ids = fields["sequence_ids"]
    num = int(ids.max()) + 1 if len(ids) else 0
    starts = torch.full((num,), len(ids)).scatter_reduce(0, ids, torch.arange(len(ids)), "amin")
    within = torch.arange(len(ids)) - starts[ids]
    groups = fields["group_ids"] if "group_ids" in fields else torch.zeros_like(ids)
    key = _mixed(_mixed(_mixed(_mixed(fields["shifted_labels"]) + within) + groups) + _bits(fields["advantages"]))
    of_sequence = torch.zeros(num, dtype=torch.int64).index_add(0, ids, key)  # wraps around, in any order alike
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
