"""Metrics that reduce exactly: over chunks, micro-batches and ranks, whatever the layout.

A metric is never a bare number. It keeps what its reduction needs (a mean keeps numerator and denominator), so that
merging parts gives what one pass over the whole would have given. Values stay on the device until they are asked for,
and `to_floats` fetches all of them at once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]
COMBINE: dict[str, Combine] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


class Metric(ABC):
    """What every metric is: a few 0-dim tensors (its fields), how they combine, and the number they show."""

    how: ClassVar[Literal["sum", "min", "max"]] = "sum"
    """How a field of one part combines with that of another."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """The tensors that it keeps, in the order of its fields."""
        return tuple(vars(self).values())

    @classmethod
    def of_parts(cls, parts: Iterable[Tensor]) -> Self:
        """Return the metric with these fields."""
        return cls(*parts)

    def merge(self, other: Metric) -> Self:
        """Return the metric of both parts together."""
        if type(self) is not type(other):
            raise TypeError(f"cannot merge {type(self).__name__} with {type(other).__name__}")
        return self.of_parts(map(COMBINE[self.how], self.parts, other.parts))

    @staticmethod
    @abstractmethod
    def number(parts: Sequence[float]) -> float:
        """Return the number to show, given the fields; NaN when nothing was measured."""

    def value(self) -> float:
        """Return the number to show; NaN when nothing was measured. Waits for the device once."""
        return self.number(fetch(self.parts))


@dataclass(frozen=True)
class Sum(Metric):
    """A total, such as a loss or a count. `total`: 0-dim tensor."""

    total: Tensor

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return the total."""
        return parts[0]


@dataclass(frozen=True)
class Mean(Metric):
    """A weighted mean kept as numerator and denominator (0-dim tensors)."""

    num: Tensor
    den: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Return the mean of all elements of `values`, which may be empty."""
        values = _whole(without_graph(values))
        return cls(_wide_sum(values), _count(values))

    @classmethod
    def of_each(cls, values: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return the mean of every tensor, all of one shape, by its name; a few operations for all."""
        if not values:
            return {}
        rows = _whole(torch.stack([without_graph(own).reshape(-1) for own in values.values()]))
        count = _count(rows, rows.shape[1])
        return {name: cls(total, count) for name, total in zip(values, _wide_sum(rows, -1), strict=True)}

    @classmethod
    def share(cls, chosen: Tensor, among: Tensor) -> Mean:
        """Return the share of `chosen` in `among`, bool of one shape and the former only where the latter is."""
        return cls(_wide_sum(_whole(chosen)), _wide_sum(_whole(among)))

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return num / den, NaN when nothing was counted."""
        num, den = parts
        return num / den if den else math.nan


@dataclass(frozen=True)
class Min(Metric):
    """The smallest value; +inf stands for "nothing measured"."""

    how = "min"
    smallest: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Min:
        """Return the minimum of all elements of `values`, which may be empty."""
        values = widened(values)
        return cls(values.amin() if values.numel() else values.new_full((), math.inf))

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return the minimum, NaN when nothing was measured."""
        return math.nan if parts[0] == math.inf else parts[0]


@dataclass(frozen=True)
class Max(Metric):
    """The largest value; -inf stands for "nothing measured"."""

    how = "max"
    largest: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Max:
        """Return the maximum of all elements of `values`, which may be empty."""
        values = widened(values)
        return cls(values.amax() if values.numel() else values.new_full((), -math.inf))

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return the maximum, NaN when nothing was measured."""
        return math.nan if parts[0] == -math.inf else parts[0]


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """The share of samples that weighted ones are worth, (sum w)^2 / (n sum w^2): 1 for equal weights, 1/n for one."""

    total: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> EffectiveSampleSize:
        """Return that of all elements of `weights`, which may be empty."""
        weights = widened(weights)
        return cls(weights.sum(), weights.square().sum(), _count(weights))

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return the share, NaN when nothing was measured or all weights are 0."""
        total, squares, count = parts
        scale = count * squares
        return total * total / scale if scale else math.nan


Metrics = Mapping[str, Metric]
M = TypeVar("M", bound=Metric)
KINDS = (Sum, Mean, Min, Max, EffectiveSampleSize)


def merge_metrics(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Merge metrics by name; a name may be absent from some parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def metrics_in(extra: object) -> dict[str, Metric]:
    """Return the metrics among what a loss returned beside the loss itself; its logits, say, are none."""
    if not isinstance(extra, Mapping):
        return {}
    return {name: value for name, value in extra.items() if isinstance(value, KINDS)}


def extremes(values: Tensor) -> tuple[Min, Max]:
    """Return the smallest and the largest of all elements of `values`, which may be empty, in one pass."""
    if not values.numel():
        return Min.of(values), Max.of(values)
    low, high = _whole(without_graph(values)).aminmax()
    dtype = wide_dtype(values)
    return Min(low.to(dtype)), Max(high.to(dtype))


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Return the number of each metric. Waits for the device once, whatever their number: call it once per step."""
    numbers = iter(fetch([part for metric in metrics.values() for part in metric.parts]))
    return {name: metric.number(_next(numbers, len(metric.parts))) for name, metric in metrics.items()}


def without_graph(values: Tensor) -> Tensor:
    """Return `values` cut off from any graph; as they are if there is none, which costs no call of torch."""
    return values.detach() if values.requires_grad else values


def widened(values: Tensor) -> Tensor:
    """Return `values` without graph in float64; float32 on mps, which has nothing wider."""
    values = _whole(without_graph(values))
    return values.to(wide_dtype(values))


def packed(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return 0-dim tensors as one vector [n] on `device`, with one transfer from each other device."""
    places: dict[torch.device, list[int]] = {}
    for place, part in enumerate(parts):
        places.setdefault(part.device, []).append(place)
    stacks = [torch.stack([widened(parts[place]).reshape(()) for place in own]) for own in places.values()]
    if len(stacks) == 1:
        return stacks[0].to(device)
    vector = torch.empty(len(parts), dtype=torch.float64, device=device)
    for own, stack in zip(places.values(), stacks, strict=True):
        vector[own] = stack.to(device).to(vector.dtype)  # in this order: mps has no float64
    return vector


def fetch(parts: Sequence[Tensor]) -> list[float]:
    """Return 0-dim tensors as numbers, with one transfer from each device that they lie on."""
    return packed(parts, torch.device("cpu")).tolist()


def _next(numbers: Iterator[float], count: int) -> list[float]:
    return list(islice(numbers, count))


def wide_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype that sums are kept in: float64, float32 on mps, which has nothing wider."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _wide_sum(values: Tensor, *dim: int) -> Tensor:
    return values.sum(*dim, dtype=wide_dtype(values))


def _count(values: Tensor, number: int | None = None) -> Tensor:
    # Filled on the device: a number sent from the host would wait for it.
    return values.new_full((), float(values.numel() if number is None else number), dtype=wide_dtype(values))


def _whole(values: Any) -> Tensor:
    """Return a sharded tensor (DTensor) as a whole one, which is a collective; any other as it is."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values
