"""Metrics that reduce exactly: over chunks, micro-batches and ranks, whatever the layout.

A metric is never a bare number. It keeps what its reduction needs (a mean keeps numerator and denominator), so merging
parts gives the same as one pass over all values. Values stay on the device until they are needed, and `to_floats`
fetches all of them at once.

Legend: [...] any shape, n tensors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import UserDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import Tensor

Combine = Callable[[Tensor, Tensor], Tensor]
COMBINE: dict[str, Combine] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


class Metric(ABC):
    """Base of every metric: a few 0-dim tensors (its fields), how they combine, and the number they show."""

    how: ClassVar[Literal["sum", "min", "max"]] = "sum"
    """How a field of one part combines with that of another."""

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Its tensors, 0-dim, in the order of its fields."""
        return tuple(vars(self).values())

    @classmethod
    def of_parts(cls, parts: Iterable[Tensor]) -> Self:
        """Return the metric with the 0-dim tensors `parts` [n] as its fields, in their order."""
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

    __float__ = item = value


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
        """Return the mean of all elements of `values` [...], which may be empty."""
        values = unsharded(without_graph(values))
        return cls(_wide_sum(values), _count(values))

    @classmethod
    def of_each(cls, values: Mapping[str, Tensor]) -> dict[str, Mean]:
        """Return the mean of each of `values` by name; all have one shape [...], which needs only a few operations."""
        if not values:
            return {}
        by_dtype: dict[torch.dtype, dict[str, Tensor]] = {}  # stacking one dtype takes half the time of mixed ones
        for name, tensor in values.items():
            by_dtype.setdefault(tensor.dtype, {})[name] = without_graph(tensor)
        means: dict[str, Mean] = {}
        for tensors in by_dtype.values():
            rows = unsharded(torch.stack([*tensors.values()])).flatten(1)
            count = next(iter(means.values())).den if means else _filled(rows, rows.shape[1])
            totals = _wide_sum(rows, -1).unbind()
            means |= {name: cls(total, count) for name, total in zip(tensors, totals, strict=True)}
        return means

    @classmethod
    def share(cls, chosen: Tensor, among: Tensor) -> Mean:
        """Return the share of `chosen` [...] in `among`, both bool of one shape; `chosen` is a subset of `among`."""
        return cls(unsharded(chosen).count_nonzero(), unsharded(among).count_nonzero())

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
        """Return the minimum of all elements of `values` [...], which may be empty."""
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
        """Return the maximum of all elements of `values` [...], which may be empty."""
        values = widened(values)
        return cls(values.amax() if values.numel() else values.new_full((), -math.inf))

    @staticmethod
    def number(parts: Sequence[float]) -> float:
        """Return the maximum, NaN when nothing was measured."""
        return math.nan if parts[0] == -math.inf else parts[0]


@dataclass(frozen=True)
class EffectiveSampleSize(Metric):
    """The effective share of weighted samples, (sum w)^2 / (n sum w^2): 1 for equal weights, 1/n for a single one."""

    total: Tensor
    squares: Tensor
    count: Tensor

    @classmethod
    def of(cls, weights: Tensor) -> EffectiveSampleSize:
        """Return the effective share of all elements of `weights` [...], which may be empty."""
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


class DeferredMetrics(UserDict[str, Metric]):
    """Metrics by name, computed when one of them is first read: a step whose metrics nobody reads takes less time.

    Until then it keeps the values of each token from which it computes them, about 40 bytes a token.
    """

    def __init__(self, metrics: Callable[[], Metrics] | Metrics) -> None:
        self._compute = metrics if callable(metrics) else lambda: metrics

    @cached_property
    def data(self) -> dict[str, Metric]:  # type: ignore[override]
        """The metrics."""
        metrics = dict(self._compute())
        del self._compute  # and with it the values of the tokens
        return metrics

    def __reduce__(self) -> tuple[type[dict[str, Metric]], tuple[dict[str, Metric]]]:
        """Copy and pickle the metrics as a dict."""
        return dict, (self.data,)


def deferred(metrics: Callable[[], Metrics], values: Tensor) -> Metrics:
    """Return metrics that are computed when one is read; at once if `values` [...] are of a DTensor.

    The sum of a DTensor is a collective, so every rank must take part, and not all ranks read metrics.

    Args:
        metrics: computes them from tensors without graph that nobody changes; called at most once.
        values: what they are computed from.
    """
    return metrics() if hasattr(values, "full_tensor") else DeferredMetrics(metrics)


def merge_metrics(parts: Iterable[Metrics]) -> dict[str, Metric]:
    """Merge metrics by name; a name may be absent from some parts."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = merged[name].merge(metric) if name in merged else metric
    return merged


def metrics_in(extra: object) -> Metrics:
    """Return the metrics in what a loss returned besides its value; logits, for example, are skipped."""
    if isinstance(extra, DeferredMetrics):
        return extra
    if not isinstance(extra, Mapping):
        return {}
    return {name: value for name, value in extra.items() if isinstance(value, Metric)}


def extremes(values: Tensor) -> tuple[Min, Max]:
    """Return the smallest and the largest of all elements of `values` [...], which may be empty, in one pass."""
    if not values.numel():
        return Min.of(values), Max.of(values)
    low, high = unsharded(without_graph(values)).aminmax()
    return Min(low), Max(high)  # exact in any dtype


def to_floats(metrics: Metrics) -> dict[str, float]:
    """Return the number of each metric. Waits for the device once in all: call it once per step."""
    numbers = iter(fetch([part for metric in metrics.values() for part in metric.parts]))
    return {name: metric.number(list(islice(numbers, len(metric.parts)))) for name, metric in metrics.items()}


def without_graph(values: Tensor) -> Tensor:
    """Return `values` [...] detached from their graph; unchanged, without a call of torch, if they have none."""
    return values.detach() if values.requires_grad else values


def widened(values: Tensor) -> Tensor:
    """Return `values` [...] without graph in float64; float32 on mps, which has nothing wider."""
    values = unsharded(without_graph(values))
    return values.to(wide_dtype(values))


def packed(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the 0-dim tensors `parts` as one vector [n] on `device`, with one transfer from each other device."""
    by_device: dict[torch.device, list[int]] = {}
    for index, part in enumerate(parts):
        by_device.setdefault(part.device, []).append(index)
    stacks = [torch.stack([widened(parts[i]).reshape(()) for i in indices]) for indices in by_device.values()]
    if len(stacks) == 1:
        return stacks[0].to(device)
    vector = torch.empty(len(parts), dtype=torch.float64, device=device)
    for indices, stack in zip(by_device.values(), stacks, strict=True):
        vector[indices] = stack.to(device).to(vector.dtype)  # in this order: mps has no float64
    return vector


def fetch(parts: Sequence[Tensor]) -> list[float]:
    """Return the 0-dim tensors `parts` as a list [n] of numbers, with one transfer from each device that holds some."""
    return packed(parts, torch.device("cpu")).tolist()


def wide_dtype(values: Tensor) -> torch.dtype:
    """Return the dtype of sums of `values` [...]: float64; float32 on mps, which has nothing wider."""
    return torch.float32 if values.device.type == "mps" else torch.float64


def _wide_sum(values: Tensor, *dim: int) -> Tensor:
    return values.sum(*dim, dtype=wide_dtype(values))


def _count(values: Tensor) -> Tensor:
    return _filled(values, values.numel())


def _filled(values: Tensor, number: int) -> Tensor:
    # Filled on the device: a number sent from the host would wait for it.
    return values.new_full((), float(number), dtype=wide_dtype(values))


def unsharded(values: Any) -> Tensor:
    """Return the full tensor [...] of a DTensor, which is a collective; other tensors unchanged."""
    return values.full_tensor() if hasattr(values, "full_tensor") else values
