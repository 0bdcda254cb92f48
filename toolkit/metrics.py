"""Metrics that reduce exactly: over chunks, micro-batches and ranks, whatever the layout.

A metric is never a bare number. It keeps what its reduction needs (a mean keeps numerator and denominator), so that
merging parts gives what one pass over the whole would have given. Values stay on the device until ``value()``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor


class Metric(Protocol):
    """What every metric can do."""

    def merge(self, other: Metric) -> Metric:
        """Return the metric of both parts together."""
        ...

    def value(self) -> float:
        """Return the number to show; NaN when nothing was measured. Waits for the device."""
        ...


def _same_kind(ours: Metric, other: Metric) -> None:
    if type(ours) is not type(other):
        raise TypeError(f"cannot merge {type(ours).__name__} with {type(other).__name__}")


@dataclass(frozen=True)
class Sum:
    """A total, such as a loss or a count. `total`: 0-dim float tensor."""

    total: Tensor

    def merge(self, other: Metric) -> Sum:
        """Add the totals."""
        _same_kind(self, other)
        return Sum(self.total + other.total)  # type: ignore[attr-defined]

    def value(self) -> float:
        """Return the total."""
        return float(self.total)


@dataclass(frozen=True)
class Mean:
    """A weighted mean kept as numerator and denominator (0-dim tensors)."""

    num: Tensor
    den: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Return the mean of all elements of `values`, which may be empty."""
        values = values.detach().double()
        return cls(values.sum(), torch.tensor(float(values.numel()), dtype=torch.float64, device=values.device))

    def merge(self, other: Metric) -> Mean:
        """Add numerators and denominators."""
        _same_kind(self, other)
        return Mean(self.num + other.num, self.den + other.den)  # type: ignore[attr-defined]

    def value(self) -> float:
        """Return num / den, NaN when nothing was counted."""
        den = float(self.den)
        return float(self.num) / den if den else math.nan


@dataclass(frozen=True)
class Min:
    """The smallest value; +inf stands for "nothing measured"."""

    smallest: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Min:
        """Return the minimum of all elements of `values`, which may be empty."""
        values = values.detach().double().reshape(-1)
        return cls(torch.cat([values, values.new_full((1,), math.inf)]).amin())

    def merge(self, other: Metric) -> Min:
        """Keep the smaller."""
        _same_kind(self, other)
        return Min(torch.minimum(self.smallest, other.smallest))  # type: ignore[attr-defined]

    def value(self) -> float:
        """Return the minimum, NaN when nothing was measured."""
        smallest = float(self.smallest)
        return math.nan if smallest == math.inf else smallest


@dataclass(frozen=True)
class Max:
    """The largest value; -inf stands for "nothing measured"."""

    largest: Tensor

    @classmethod
    def of(cls, values: Tensor) -> Max:
        """Return the maximum of all elements of `values`, which may be empty."""
        values = values.detach().double().reshape(-1)
        return cls(torch.cat([values, values.new_full((1,), -math.inf)]).amax())

    def merge(self, other: Metric) -> Max:
        """Keep the larger."""
        _same_kind(self, other)
        return Max(torch.maximum(self.largest, other.largest))  # type: ignore[attr-defined]

    def value(self) -> float:
        """Return the maximum, NaN when nothing was measured."""
        largest = float(self.largest)
        return math.nan if largest == -math.inf else largest


@dataclass(frozen=True)
class EffectiveSampleSize:
    """The share of samples that weighted ones are worth, (sum w)^2 / (n sum w^2): 1 for equal weights, 1/n for one."""

    total: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> EffectiveSampleSize:
        """Return that of all elements of `weights`, which may be empty."""
        weights = weights.detach().double()
        count = torch.tensor(float(weights.numel()), dtype=torch.float64, device=weights.device)
        return cls(weights.sum(), weights.square().sum(), count)

    def merge(self, other: Metric) -> EffectiveSampleSize:
        """Add the sums: the result is that of both parts as one."""
        _same_kind(self, other)
        assert isinstance(other, EffectiveSampleSize)
        return EffectiveSampleSize(self.total + other.total, self.squares + other.squares, self.count + other.count)

    def value(self) -> float:
        """Return the share, NaN when nothing was measured or all weights are 0."""
        scale = float(self.count) * float(self.squares)
        return float(self.total) ** 2 / scale if scale else math.nan


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


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Return the number of each metric. One device synchronisation per tensor: call it once per step."""
    return {name: metric.value() for name, metric in metrics.items()}
