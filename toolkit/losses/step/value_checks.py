"""Checks of what the items of a step hold, with one transfer from the device for all items and fields.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.items import LossContextInputItem
from toolkit.metrics import fetch, wide_dtype

MAX_LOGPROB = math.log(1.01)
"""Largest log-probability in nats; above 0 because of rounding to bf16."""


@dataclass(frozen=True)
class _Field:
    """A field of one item."""

    where: str
    """Its name in messages."""
    values: Tensor
    """[B, T]."""
    is_free: Tensor
    """[B, T] bool, True for positions that may hold anything."""
    must_be_finite: bool
    is_logprob: bool

    def numbers(self) -> list[Tensor]:
        """Return the 0-dim numbers that `check` reads: a sum, if all must be finite; the largest log-probability."""
        masked = self.values.detach().masked_fill(self.is_free, 0.0)
        if not self.must_be_finite:
            masked = masked.masked_fill(masked.isnan(), 0.0)  # a sampler may not report every token
        sums = [masked.sum(dtype=wide_dtype(masked))] if self.must_be_finite else []
        return [*sums, masked.amax()] if self.is_logprob else sums

    def check(self, numbers: Iterator[float]) -> None:
        """Raise `DataError` if the values are wrong; takes its own from `numbers`."""
        # A finite sum has finite parts; any other may have overflowed.
        if self.must_be_finite and not math.isfinite(next(numbers)):
            self._refuse(
                ~self.values.isfinite(),
                "at a scored position; only positions whose label is ignore_idx may hold NaN or inf; mask the position "
                "or fix the value",
            )
        if self.is_logprob and next(numbers) > MAX_LOGPROB:
            self._refuse(
                self.values > MAX_LOGPROB,
                "at a scored position, but a log-probability is at most 0; did you pass probabilities or negative "
                "log-likelihoods?",
            )

    def _refuse(self, is_wrong: Tensor, why: str) -> None:
        wrong = (is_wrong & ~self.is_free).nonzero()
        if len(wrong):
            index = wrong[0].tolist()
            raise DataError(f"{self.where}{index} = {float(self.values[tuple(index)]):.6g} {why}")


def check_values(items: Sequence[LossContextInputItem], finite: Collection[str], ignore_idx: int) -> list[int | None]:
    """Check the scored positions of the items of a step; return the largest label of each, None if one is negative.

    Args:
        items: of this rank.
        finite: fields that must hold finite values. Log-probabilities must be at most 0 in any field that is there.
        ignore_idx: label of positions that may hold anything.

    Raises:
        DataError: names the first position with NaN or inf, or with a log-probability above 0.
    """
    fields: list[_Field] = []
    bounds: list[Tensor] = []
    for index, item in enumerate(items):
        if item.shifted_labels.numel():
            is_free = item.shifted_labels == ignore_idx
            bounds += item.shifted_labels.masked_fill(is_free, 0).aminmax()
            fields += _fields_of(item, f"data_batches[{index}]", is_free, finite)
    numbers = iter(fetch([*bounds, *(number for field in fields for number in field.numbers())]) if bounds else [])
    ranges = [(next(numbers), next(numbers)) if item.shifted_labels.numel() else (0, -1) for item in items]
    for field in fields:
        field.check(numbers)
    return [int(highest) if lowest >= 0 else None for lowest, highest in ranges]


def _fields_of(item: LossContextInputItem, where: str, is_free: Tensor, finite: Collection[str]) -> Iterator[_Field]:
    for name, values in item.tensors():
        is_logprob = name.endswith("_logprobs")
        if values.shape == is_free.shape and (is_logprob or name in finite):
            yield _Field(f"{where}.{name}", values, is_free, name in finite, is_logprob)
