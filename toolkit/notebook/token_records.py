"""Completions with values for each token, whatever file they come from. No widgets here."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import DataError

TEXT, STATUS = "text", "status"
ITEM = "item "
"""What the group of a sequence begins with that comes from an item, not from a prompt."""
SIGNALS: dict[str, str] = {
    "logprob": "log-probability (nats)",
    "ratio": "ratio pi / pi_old",
    "advantage": "advantage",
    "entropy": "entropy (nats)",
    "kl": "KL to the reference, k3 (nats)",
    "loss": "token loss",
    "coefficient": "gradient coefficient: how much a step raises log pi, over the weight",
    "weight": "weight in the loss",
    "mismatch": "log pi_old - log pi_rollout (nats)",
    "status": "clipped or rejected by",
}
"""What tokens can be coloured by, with units."""
CENTERS = {"ratio": 1.0, "advantage": 0.0, "coefficient": 0.0, "mismatch": 0.0, "loss": 0.0}
"""Signals with two directions, and the value between them; the others grow from their smallest value."""
WORD = re.compile(r"\s*\S+|\s+$")
"""A piece of a text whose tokens are not known."""


@dataclass(frozen=True, kw_only=True)
class TokenRecord:
    """One completion."""

    tokens: Mapping[str, Sequence[Any]]
    """Lists of the same length, by name: ``text`` and any of `SIGNALS`, ``old``, ``current``, ``rollout``, ``ref``,
    ``id``; None in a list: not known for this token."""
    prompt: str = ""
    reward: float | None = None
    advantage: float | None = None
    step: int | None = None
    group: str = ""
    """Which completions answer the same prompt; they are shown side by side."""
    sample: int = 0
    """Number within the group."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """Other facts, such as the parts of the reward."""

    @property
    def text(self) -> str:
        """The completion."""
        return "".join(self.tokens[TEXT])

    def __len__(self) -> int:
        return len(self.tokens[TEXT])


def record_of(tokens: Mapping[str, Sequence[Any]], **fields: Any) -> TokenRecord:
    """Return a record with the signals that follow from those in `tokens`.

    Raises:
        DataError: there is no text, or the lists differ in length.
    """
    if TEXT not in tokens:
        raise DataError(f"a record of tokens has {', '.join(tokens)} but no text")
    lengths = {name: len(values) for name, values in tokens.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the lists of a record of tokens differ in length: {lengths}")
    known = {name: list(values) for name, values in tokens.items()}
    known |= {name: values for name, values in _derived(known).items() if name not in known}
    return TokenRecord(tokens=known, **fields)


def record_of_text(text: str, advantage: float | None = None, **fields: Any) -> TokenRecord:
    """Return a record of a completion whose tokens are not known: one piece for each word."""
    pieces = WORD.findall(text) or [text]
    tokens: dict[str, Sequence[Any]] = {TEXT: pieces}
    if advantage is not None:
        tokens["advantage"] = [advantage] * len(pieces)
    return record_of(tokens, advantage=advantage, **fields)


def _derived(tokens: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """Return log-probability, ratio, KL and mismatch from the log-probabilities of the policies."""
    made: dict[str, list[Any]] = {}
    current = tokens.get("current") or tokens.get("old") or tokens.get("rollout")
    if current is not None:
        made["logprob"] = list(current)
    pairs = {
        "ratio": ("current", "old", lambda d: math.exp(min(d, 60.0))),
        "kl": ("current" if "current" in tokens else "old", "ref", lambda d: math.expm1(min(-d, 60.0)) + d),
        "mismatch": ("old", "rollout", lambda d: d),
    }
    for name, (one, other, of) in pairs.items():
        if one in tokens and other in tokens:
            made[name] = [
                of(a - b) if is_number(a) and is_number(b) else None
                for a, b in zip(tokens[one], tokens[other], strict=True)
            ]
    return made


def is_number(value: Any) -> bool:
    """Whether a value can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
