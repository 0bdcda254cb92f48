"""What the token view shows: filters, order, limits of colours, the worst tokens, charts. No widgets here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from toolkit.notebook.charts import Bar, Chart, Line, View
from toolkit.notebook.token_records import CENTERS, ITEM, SIGNALS, STATUS, TokenRecord, is_number

Order = Literal["as in the file", "largest signal first", "lowest reward first", "highest reward first"]
ORDERS: tuple[Order, ...] = ("as in the file", "largest signal first", "lowest reward first", "highest reward first")
MAX_BINS = 12
"""Bars of the histogram of rewards."""
SPREAD = 0.98
"""Share of the tokens inside the ends of the colour scale: a few huge values would leave all others pale."""
NUM_POSITIONS = 60
"""Points of the chart over positions, at most."""


@dataclass
class TokenModel:
    """Records and what is chosen of them."""

    records: Sequence[TokenRecord]
    signal: str = ""
    """What tokens are coloured by; a name in `SIGNALS`."""
    text: str = ""
    """Only completions whose prompt or text holds this, upper or lower case."""
    step: int | None = None
    group: str | None = None
    only_marked: bool = False
    """Only completions with a clipped or rejected token."""
    bins: frozenset[int] = frozenset()
    """Only completions with a reward in one of these bins; empty: all."""
    order: Order = "as in the file"
    is_grouped: bool = False
    """Whether completions of a prompt stand side by side."""
    _edges: list[float] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        known = self.signals()
        if self.signal not in known:
            self.signal = known[0] if known else ""
        self._edges = edges_of([r.reward for r in self.records if is_number(r.reward)])

    def signals(self) -> list[str]:
        """Return what the records have, in the order of `SIGNALS`."""
        names = {name for record in self.records for name in record.tokens}
        return [name for name in SIGNALS if name in names]

    def steps(self) -> list[int]:
        """Return the steps of the records, in order."""
        return sorted({record.step for record in self.records if record.step is not None})

    # ------------------------------------------------------------------ choosing

    def chosen(self) -> list[int]:
        """Return the indices of the records that pass the filters, in order."""
        indices = [index for index, record in enumerate(self.records) if self._passes(record)]
        if self.order == "largest signal first":
            largest = {index: self._extent(self.records[index]) for index in indices}
            indices.sort(key=lambda index: -largest[index])
        elif self.order != "as in the file":
            sign = 1 if self.order == "lowest reward first" else -1
            indices.sort(key=lambda index: _sortable(self.records[index].reward, sign))
        if self.is_grouped:
            first: dict[tuple[Any, str], int] = {}
            for number, index in enumerate(indices):
                first.setdefault((self.records[index].step, self.records[index].group), number)
            indices.sort(key=lambda index: first[self.records[index].step, self.records[index].group])
        return indices

    def _passes(self, record: TokenRecord) -> bool:
        wanted = self.text.lower()
        return (
            (not wanted or wanted in record.text.lower() or wanted in record.prompt.lower())
            and (self.step is None or record.step == self.step)
            and (self.group is None or record.group == self.group)
            and (not self.only_marked or any(record.tokens.get(STATUS, ())))
            and (not self.bins or (is_number(record.reward) and bin_of(record.reward, self._edges) in self.bins))
        )

    def _extent(self, record: TokenRecord) -> float:
        return max((self._distance(value) for value in record.tokens.get(self.signal, ())), default=-1.0)

    def _distance(self, value: Any) -> float:
        """Return how far a value is from where nothing happens; -1 where it is not known."""
        if self.signal == STATUS:
            return 1.0 if value else -1.0
        if not is_number(value):
            return -1.0
        if self.signal == "ratio":
            return abs(math.log(value)) if value > 0 else 0.0
        return abs(value - CENTERS.get(self.signal, 0.0))

    def worst(self, count: int = 20) -> list[tuple[int, int]]:
        """Return the tokens farthest from where nothing happens, the worst first: (record, position).

        Farthest is by the signal: the log ratio, the distance from 0; for log-probabilities the least likely token.
        """
        tokens = [
            (distance, -index, -position)
            for index in self.chosen()
            for position, value in enumerate(self.records[index].tokens.get(self.signal, ()))
            if (distance := self._distance(value)) > 0
        ]
        return [(-index, -position) for _, index, position in sorted(tokens, reverse=True)[:count]]

    # ------------------------------------------------------------------ colours

    def scale(self) -> dict[str, Any]:
        """Return how values become colours: kind, ends, and the kinds of status in use."""
        if self.signal == STATUS:
            marks = (value for record in self.records for value in record.tokens.get(STATUS, ()))
            return {"kind": "status", "names": sorted({str(mark) for mark in marks if mark})}
        values = sorted(v for record in self.records for v in record.tokens.get(self.signal, ()) if is_number(v))
        if not values:
            return {"kind": "none"}
        if self.signal in CENTERS:
            center = CENTERS[self.signal]
            reach = sorted(abs(value - center) for value in values)
            return {"kind": "two ways", "center": center, "reach": _quantile(reach, SPREAD) or reach[-1] or 1.0}
        if self.signal == "logprob":
            return {"kind": "one way", "low": _quantile(values, 1 - SPREAD) or -1.0, "high": 0.0, "is_reversed": True}
        return {"kind": "one way", "low": 0.0, "high": _quantile(values, SPREAD) or 1.0, "is_reversed": False}

    # ------------------------------------------------------------------ what is sent

    def as_data(self) -> list[dict[str, Any]]:
        """Return the records as JSON values; they are sent once."""
        return [
            {
                "tokens": {name: [_plain(value) for value in values] for name, values in record.tokens.items()},
                "prompt": record.prompt,
                "group": f"{record.step} {record.group}",
                "title": title_of(record),
            }
            for record in self.records
        ]

    def as_view(self) -> dict[str, Any]:
        """Return what is chosen; sent whenever it changes."""
        return {
            "chosen": self.chosen(),
            "signal": self.signal,
            "label": SIGNALS.get(self.signal, ""),
            "scale": self.scale(),
            "is_grouped": self.is_grouped,
            "text": self.text,
            "worst": self.worst(),
        }

    def status(self) -> str:
        """Return how much is shown, in words."""
        chosen = self.chosen()
        tokens = sum(len(self.records[index]) for index in chosen)
        return f"{len(chosen):,} of {len(self.records):,} completions, {tokens:,} tokens"

    def charts(self) -> View:
        """Return the histogram of rewards and the chart of the signal over positions."""
        charts = [chart for chart in (self._histogram(), self._positions()) if chart is not None]
        return View(charts=tuple(charts))

    def _histogram(self) -> Chart | None:
        rewards = [record.reward for record in self.records if is_number(record.reward)]
        if not rewards:
            return None
        counts = [0] * max(1, len(self._edges) - 1)
        for reward in rewards:
            counts[bin_of(reward, self._edges)] += 1
        is_value = len(set(rewards)) <= MAX_BINS  # a bar for each
        bars = tuple(
            Bar(
                label=f"{low:.3g}" if is_value else f"{low:.3g} to {high:.3g}",
                value=float(count),
                style=1 if index in self.bins else 0,
                key=str(index),
            )
            for index, (count, low, high) in enumerate(zip(counts, self._edges, self._edges[1:], strict=False))
        )
        chosen = "click bars to filter" if not self.bins else "filtered by the orange bars"
        return Chart(title=f"Rewards ({chosen})", x_label="", y_label="completions", bars=bars)

    def _positions(self) -> Chart | None:
        """Return the mean of the signal over the position in the completion, with the share of marked tokens."""
        if not self.signal:
            return None
        indices = self.chosen()
        longest = max((len(self.records[index]) for index in indices), default=0)
        if not longest:
            return None
        width = max(1, -(-longest // NUM_POSITIONS))
        sums: dict[int, list[float]] = {}
        for index in indices:
            for position, value in enumerate(self.records[index].tokens.get(self.signal, ())):
                number = (100.0 if value else 0.0) if self.signal == STATUS else value
                if is_number(number):
                    sums.setdefault(position // width, []).append(number)
        points = sorted(sums)
        label = "% of tokens clipped or rejected" if self.signal == STATUS else SIGNALS[self.signal].partition(":")[0]
        line = Line(
            label=label,
            x=[float(point * width) for point in points],
            y=[sum(sums[point]) / len(sums[point]) for point in points],
        )
        return Chart(title=f"Mean of {label}", x_label="position (tokens)", y_label=label.split(",")[0], lines=(line,))


def title_of(record: TokenRecord) -> str:
    """Return the line above a completion."""
    parts = [] if record.step is None else [f"step {record.step + 1}"]
    parts += [group_label(record.group)] if record.group else []
    parts.append(f"sequence {record.sample + 1}" if record.group.startswith(ITEM) else f"sample {record.sample}")
    parts += [f"reward {record.reward:.4g}"] if is_number(record.reward) else []
    parts += [f"advantage {record.advantage:.4g}"] if is_number(record.advantage) else []
    parts.append(f"{len(record)} tokens")
    parts += [f"{name} {_short(value)}" for name, value in record.details.items() if value is not None]
    return " · ".join(parts)


def group_label(group: str) -> str:
    """Return a group in words."""
    return group if group.startswith(ITEM) else f"prompt {group}"


def edges_of(values: Sequence[float | None]) -> list[float]:
    """Return edges of the bins of a histogram: one bin for each value if there are few, else `MAX_BINS` equal ones."""
    known = sorted({float(value) for value in values if value is not None})
    if len(known) <= MAX_BINS:
        return [*known, known[-1]] if known else []
    low, high = known[0], known[-1]
    return [low + (high - low) * index / MAX_BINS for index in range(MAX_BINS + 1)]


def bin_of(value: float | None, edges: Sequence[float]) -> int:
    """Return the bin of a value: the last one whose lower edge is not above it."""
    assert value is not None
    last = max(0, len(edges) - 2)
    return max((index for index in range(last + 1) if edges[index] <= value), default=0)


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def _sortable(reward: float | None, sign: int) -> tuple[bool, float]:
    return (not is_number(reward), sign * reward if is_number(reward) and reward is not None else 0.0)


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _short(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else str(value)[:60]
