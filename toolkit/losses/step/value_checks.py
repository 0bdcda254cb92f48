"""Checks of what the items of a step hold, with one transfer from the device for all items and fields.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.items import LossContextInputItem
from toolkit.metrics import wide_dtype, without_graph

MAX_LOGPROB = math.log(1.01)
"""Largest log-probability in nats; above 0 because of rounding to bf16."""
REMEDIES = {
    "rollout_logprobs": ", or give such tokens no weight: missing_rollout='reject' (on the command line "
    "loss.missing_rollout=reject)"
}
"""What else to do about a value that is not finite, by the field."""


def check_values(items: Sequence[LossContextInputItem], finite: Collection[str], ignore_idx: int) -> list[int | None]:
    """Check the scored positions of the items of a step; return the largest label of each, None if one is negative.

    Args:
        items: of this rank.
        finite: fields that must hold finite values. Log-probabilities must be at most 0 in any field that is there.
        ignore_idx: label of positions that may hold anything.

    Raises:
        DataError: names the first position with NaN or inf, or with a log-probability above 0.
    """
    checked = [_checked_fields(item, finite) for item in items]
    vectors = [each for item, fields in zip(items, checked, strict=True) for each in _numbers(item, fields, ignore_idx)]
    numbers = torch.cat(vectors).tolist() if vectors else []  # waits for the device once
    largest: list[int | None] = []
    start = 0
    for index, (item, fields) in enumerate(zip(items, checked, strict=True)):
        middle, end = start + len(fields) + 1, start + 2 * (len(fields) + 1)
        *highest, highest_label = numbers[start:middle]
        *lowest, lowest_label = numbers[middle:end]
        start = end
        for (name, values), high, low in zip(fields.items(), highest, lowest, strict=True):
            # Both are NaN if any value is; a sampler may report NaN.
            if not (math.isfinite(high) and math.isfinite(low)) or (high > MAX_LOGPROB and _is_logprob(name)):
                is_scored = item.shifted_labels != ignore_idx
                _check_field(f"data_batches[{index}]", name, values, is_scored, name in finite)
        largest.append(int(highest_label) if lowest_label >= 0 else None)
    return largest


def _checked_fields(item: LossContextInputItem, finite: Collection[str]) -> dict[str, Tensor]:
    shape = item.shifted_labels.shape
    return {
        name: without_graph(values)
        for name, values in item.tensors()
        if (name in finite or _is_logprob(name)) and values.shape == shape
    }


def _numbers(item: LossContextInputItem, fields: Mapping[str, Tensor], ignore_idx: int) -> Sequence[Tensor]:
    """Return the largest and the smallest values of every field, and last of the labels, over scored positions."""
    labels = item.shifted_labels
    # Labels are exact in float64, as they would not be in fp32; they make the others as wide, too.
    rows = torch.stack([*fields.values(), labels.to(wide_dtype(labels))])
    if not labels.numel():
        nothing = rows.new_zeros(len(rows))
        return nothing - 1, nothing  # no value is out of range, and the largest label is -1
    rows = rows.masked_fill_(labels == ignore_idx, 0.0).flatten(1)
    return rows.amax(1), rows.amin(1)


def _check_field(where: str, name: str, values: Tensor, is_scored: Tensor, must_be_finite: bool) -> None:
    causes = {
        "at a scored position; only positions whose label is ignore_idx may hold NaN or inf; mask the position or fix "
        f"the value{REMEDIES.get(name, '')}": ~values.isfinite() & must_be_finite,
        "at a scored position, but a log-probability is at most 0; did you pass probabilities or negative "
        "log-likelihoods?": (values > MAX_LOGPROB) & _is_logprob(name),
    }
    for cause, is_wrong in causes.items():
        wrong = (is_wrong & is_scored).nonzero()
        if len(wrong):
            index = wrong[0].tolist()
            raise DataError(f"{where}.{name}{index} = {float(values[tuple(index)]):.6g} {cause}")


def _is_logprob(name: str) -> bool:
    return name.endswith("_logprobs")
