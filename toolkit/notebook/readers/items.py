"""Items of a batch: one completion for each row and each run of scored tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from toolkit.losses.items import RLLossContextInputItem
from toolkit.notebook.token_records import ITEM, TEXT, TokenRecord, record_of

FIELDS = {
    "advantages": "advantage",
    "old_logprobs": "old",
    "ref_logprobs": "ref",
    "rollout_logprobs": "rollout",
    "current_logprobs": "current",
}
"""Fields of an item and what tokens call them."""


def of_items(
    items: Iterable[RLLossContextInputItem], decode: Callable[[int], str] | None = None, *, ignore_idx: int = -100
) -> list[TokenRecord]:
    """Return the scored tokens of items.

    Args:
        items: of a batch; fields are [B, T].
        decode: the text of a token id, such as ``tokenizer.decode``; None: the number.
        ignore_idx: label of a position that is not scored.
    """
    records = []
    for number, item in enumerate(items):
        for row, labels in enumerate(item.shifted_labels.tolist()):
            scored = [position for position, label in enumerate(labels) if label != ignore_idx]
            if not scored:
                continue
            ids = [labels[position] for position in scored]
            tokens: dict[str, list[Any]] = {
                TEXT: [f"{each} " if decode is None else decode(each) for each in ids],
                "id": ids,
            }
            for field, name in FIELDS.items():
                values = getattr(item, field)
                if values is not None:
                    of_row = values.expand(item.shifted_labels.shape)[row].tolist()
                    tokens[name] = [of_row[position] for position in scored]
            records.append(record_of(tokens, group=f"{ITEM}{number + 1}", sample=row))
    return records
