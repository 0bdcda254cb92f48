"""A batch as records: which positions belong to which sequence, which count, and what each weighs. No widgets here."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError, DataError, a_type
from toolkit.explain.facts import AGGREGATIONS
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.policy import BaseRLLossConfig, GRPOLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.step.step import step_weights
from toolkit.notebook.charts import Bar, Chart, View
from toolkit.notebook.readers.items import FIELDS
from toolkit.notebook.token_records import ITEM, TEXT, TokenRecord, record_of

MASKED = "·"
"""Text of a position that is not scored: its token is not among the labels."""
MOST_BARS = 24


def batch_records(
    items: Sequence[RLLossContextInputItem],
    runner: Any = None,
    cu_seq_lens_list: Sequence[Tensor | None] | None = None,
    decode: Callable[[int], str] | None = None,
) -> list[TokenRecord]:
    """Return one record for each sequence of a step, with the weight of each position in the policy term.

    Args:
        items: the micro-batches of one optimizer step on this process; fields are [B, T].
        runner: a `LossRunner` or a config; its aggregation decides the weights. None: the default one.
        cu_seq_lens_list: for each item the [S + 1] boundaries of its packed row; None: a row is a sequence.
        decode: the text of a token id; None: the number.

    Raises:
        DataError: `items` is empty or holds something else, or boundaries are invalid.
        ConfigError: the loss is not built on a policy loss.
    """
    _check_items(items)
    cfg = GRPOLossConfig() if runner is None else getattr(runner, "loss_cfg", runner)
    if not isinstance(cfg, BaseRLLossConfig):
        raise ConfigError(f"{type(cfg).__name__} is not built on a policy loss; give a runner of GRPOLossConfig")
    bounds = [None] * len(items) if cu_seq_lens_list is None else cu_seq_lens_list
    if not isinstance(bounds, (list, tuple)) or len(bounds) != len(items):
        raise DataError(
            f"cu_seq_lens_list must be a list with the boundaries of each of the {len(items)} items, or None for an "
            "item whose rows are sequences"
        )
    weights = _weights(items, cfg, bounds)
    counts = _counts(items, bounds, cfg.ignore_idx)
    records = []
    for number, (item, cuts, weight) in enumerate(zip(items, bounds, weights, strict=True)):
        for row, labels in enumerate(item.shifted_labels):
            for index, (start, end) in enumerate(spans(labels, cuts)):
                fields = {"group": f"{ITEM}{number + 1}", "sample": index if cuts is not None else row}
                part = slice(start, end)
                words = _words(cfg.aggregation, int((labels[part] != cfg.ignore_idx).sum()), counts)
                records.append(_record(item, row, part, weight, cfg.ignore_idx, decode, words, fields))
    return records


def _check_items(items: Any) -> None:
    """Raise if `items` is not a list of items."""
    wanted = "batch_view needs a list of RLLossContextInputItem, one for each micro-batch"
    made = "RLLossContextInputItem.from_unshifted(input_ids, mask, ...) makes one"
    if isinstance(items, BaseRLLossConfig) or hasattr(items, "loss_cfg"):
        raise DataError(f"{wanted}; the first argument is {a_type(items)}: call batch_view(items, runner)")
    if isinstance(items, RLLossContextInputItem):
        raise DataError(f"{wanted}, not the item itself: call batch_view([item], runner)")
    if not isinstance(items, (list, tuple)):
        raise DataError(f"{wanted}, not {a_type(items)}; {made}")
    if not items:
        raise DataError(f"{wanted}; the list is empty")
    wrong = [item for item in items if not isinstance(item, RLLossContextInputItem)]
    if wrong:
        raise DataError(f"{wanted}; the list holds {a_type(wrong[0])}; {made}")


def spans(labels: Tensor, bounds: Tensor | None) -> list[tuple[int, int]]:
    """Return first position and end of each sequence of a row.

    Args:
        labels: [T] of the row.
        bounds: [S + 1] where sequences begin and end; None: the row is one sequence.
    """
    if bounds is None:
        return [(0, len(labels))]
    cuts = bounds.tolist()
    return list(pairwise(cuts))


def batch_charts(records: Sequence[TokenRecord]) -> View:
    """Return charts of how many tokens of each sequence count, and of what they weigh together."""
    shown = records[:MOST_BARS]
    labels = [f"{index + 1}" for index in range(len(shown))]
    scored = [sum(value is not None for value in record.tokens["weight"]) for record in shown]
    shares = [sum(value or 0.0 for value in record.tokens["weight"]) for record in shown]
    total = sum(sum(value or 0.0 for value in record.tokens["weight"]) for record in records) or 1.0
    charts = (
        Chart(
            title="Scored tokens", x_label="", y_label="tokens",
            bars=tuple(Bar(label=label, value=float(count)) for label, count in zip(labels, scored, strict=True)),
        ),
        Chart(
            title="Share of the weights", x_label="", y_label="%",
            bars=tuple(
                Bar(label=label, value=100 * each / total, style=2) for label, each in zip(labels, shares, strict=True)
            ),
        ),
    )  # fmt: skip
    positions = sum(len(record) for record in records)
    all_scored = sum(value is not None for record in records for value in record.tokens["weight"])
    note = f"{len(records)} sequences, {positions:,} positions, {all_scored:,} of them scored; "
    note += f"the weights sum to {total:.4g}."
    return View(charts=charts, notes=(note,))


def _weights(
    items: Sequence[RLLossContextInputItem], cfg: BaseRLLossConfig, bounds: Sequence[Tensor | None]
) -> list[Tensor]:
    """Return the weights of the policy term of each item, [B, T]; under per_component those of both parts."""
    sums = [torch.zeros(item.shifted_labels.shape, dtype=torch.float64) for item in items]
    for term in cfg.checked_terms:
        if term.name.startswith("policy"):
            of_term = step_weights(
                items, term.average, bounds, token_filter=term.token_filter, ignore_idx=cfg.ignore_idx
            )
            sums = [total + term.coef * weight for total, weight in zip(sums, of_term, strict=True)]
    return sums


def _counts(
    items: Sequence[RLLossContextInputItem], bounds: Sequence[Tensor | None], ignore_idx: int
) -> dict[str, int]:
    """Return what denominators count: N scored tokens and S sequences with any."""
    lengths = [
        int((labels[start:end] != ignore_idx).sum())
        for item, cuts in zip(items, bounds, strict=True)
        for labels in item.shifted_labels
        for start, end in spans(labels, cuts)
    ]
    return {"N": sum(lengths), "S": sum(length > 0 for length in lengths)}


def _words(chosen: AggregationConfig, length: int, counts: dict[str, int]) -> str:
    settings = chosen.model_dump().items()
    numbers = {name: f"{value:g}" if isinstance(value, float) else value for name, value in settings}
    formula = AGGREGATIONS[chosen.name].weight.format_map(numbers)
    counted = {**counts, "n": length}
    used = {name: value for name, value in counted.items() if re.search(rf"\b{name}\b(?![+_-])", formula)}
    values = ", ".join(f"{name} = {value}" for name, value in used.items())
    return f"{formula}{f' with {values}' if values else ''}"


def _record(
    item: RLLossContextInputItem,
    row: int,
    part: slice,
    weight: Tensor,
    ignore_idx: int,
    decode: Callable[[int], str] | None,
    words: str,
    fields: dict[str, Any],
) -> TokenRecord:
    labels = item.shifted_labels[row, part].tolist()
    scored = [label != ignore_idx for label in labels]
    text = [
        (f"{label} " if decode is None else decode(label)) if counts else MASKED
        for label, counts in zip(labels, scored, strict=True)
    ]
    tokens: dict[str, list[Any]] = {TEXT: text, "id": labels}
    for field, name in {**FIELDS, "weight": "weight"}.items():
        values = weight if name == "weight" else getattr(item, field)
        if values is not None:
            of_row = values.expand(item.shifted_labels.shape)[row, part].tolist()
            tokens[name] = [value if counts else None for value, counts in zip(of_row, scored, strict=True)]
    details = {
        "positions": f"{part.start} to {part.stop - 1} of row {row + 1}",
        "scored": sum(scored),
        "weight": words,
    }
    return record_of(tokens, details=details, **fields)
