"""Which rows only measure: a share, a file or a column; the same for the same seed. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, TypeVar

Row = TypeVar("Row")

HELD_OUT = ("true", "1", "yes", "heldout", "held_out", "test", "validation", "valid", "val", "dev", "eval")
TRAINED = ("false", "0", "no", "train", "training", "")
"""What the column ``task.heldout_column`` may hold."""


def is_heldout(value: Any) -> bool | None:
    """Return what a value of the column says; None if that is not clear."""
    text = str(value).strip().lower()
    return True if text in HELD_OUT else False if text in TRAINED or value is None else None


def content_of(prompt: Any) -> str:
    """Return a text that is the same for equal prompts, chat messages included."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)


def by_share(
    rows: Sequence[Row], share: float, most: int, seed: int, content: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Return (train, held out): a share of the different prompts, at least one, at most `most` rows.

    Rows with one prompt stay together, so no prompt is in both.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(content(row), []).append(row)
    order = list(groups)
    Random(f"{seed}/heldout").shuffle(order)
    wanted = min(max(1, round(share * len(rows))), most) if share > 0 else 0
    heldout: list[Row] = []
    kept_back: set[str] = set()
    for prompt in order:
        if len(heldout) >= wanted or len(kept_back) == len(order) - 1:  # one prompt at least is for training
            break
        kept_back.add(prompt)
        heldout += groups[prompt]
    train = [row for row in rows if content(row) not in kept_back]
    return train, heldout[:most]


def apart(
    train: Sequence[Row], heldout: Sequence[Row], most: int, seed: int, content: Callable[[Row], str]
) -> tuple[list[Row], list[Row]]:
    """Return (train, held out): at most `most` held-out rows, and train without any prompt that is held out."""
    kept_back = {content(row) for row in heldout}
    chosen = list(heldout)
    if len(chosen) > most:
        Random(f"{seed}/heldout").shuffle(chosen)
    return [row for row in train if content(row) not in kept_back], chosen[:most]
