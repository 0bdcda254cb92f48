"""Charts as plain data: what the widget draws in a browser and `picture` draws by matplotlib. No widgets here."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D46")
"""Okabe and Ito's colours, which people with any colour blindness can tell apart; the darker ones first."""
DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3), (4, 4), (12, 3), (1, 3))
"""One pattern for each colour: lines differ without colour, too. Units: pixels on, pixels off."""
PALETTE = 96
"""Colours of a PNG."""
DIGITS = 9
"""Decimals of a number that is sent to the browser."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve. `y` may hold None: a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: int = 0
    """Index in `COLORS` and `DASHES`."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """A range of x that is shaded."""

    low: float
    high: float
    label: str
    is_strong: bool = True
    """Whether it is shaded fully, or only hatched."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a bar chart."""

    label: str
    value: float
    style: int = 0
    key: str = ""
    """What a click on it reports; empty: it cannot be clicked."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One chart: lines over x, or bars."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...] = ()
    bands: tuple[Band, ...] = ()
    bars: tuple[Bar, ...] = ()
    is_log: bool = False
    """Whether x is on a logarithmic axis."""
    marker: float | None = None
    """An x that a vertical line marks, such as the ratio 1."""

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values with `DIGITS` decimals; what is not finite becomes None."""
        # Not `asdict`: it copies every number, which takes ten times as long.
        return {
            **vars(self),
            "lines": [{**vars(line), "x": _rounded(line.x), "y": _rounded(line.y)} for line in self.lines],
            "bands": [vars(band) for band in self.bands],
            "bars": [vars(bar) for bar in self.bars],
        }


@dataclass(frozen=True, kw_only=True)
class CopyText:
    """A text with a button that copies it."""

    label: str
    text: str


@dataclass(frozen=True, kw_only=True)
class View:
    """What is on the screen: charts, texts to copy, and remarks."""

    charts: tuple[Chart, ...] = ()
    texts: tuple[CopyText, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> str:
        """Return the view as JSON, which is sent at once; a tree would be searched for binary parts first."""
        return json.dumps(self.as_dict(), separators=(",", ":"))

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "charts": [chart.as_dict() for chart in self.charts],
            "texts": [vars(text) for text in self.texts],
            "notes": list(self.notes),
        }


def _rounded(values: Sequence[float | None]) -> list[float | None]:
    return [None if value is None or not math.isfinite(value) else round(value, DIGITS) for value in values]


def picture(view: View, columns: int = 2) -> bytes:
    """Return a PNG of the charts, for exported notebooks and forges.

    Args:
        view: charts are drawn in reading order; texts stand below them.
        columns: charts beside each other.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(1, math.ceil(len(view.charts) / columns))
    texts = [*view.notes, *(f"{text.label}: {text.text}" for text in view.texts)]
    lines_of_text = [line for text in texts for line in textwrap.wrap(text, 72 * columns, subsequent_indent="    ")]
    height = 2.8 * rows if view.charts else 0.3
    figure = Figure(figsize=(5.2 * columns, height + 0.2 * len(lines_of_text)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(view.charts) :]:
        axis.set_axis_off()
    for axis, chart in zip(axes.flat, view.charts, strict=False):
        _draw(axis, chart)
    if lines_of_text:
        figure.supxlabel(
            "\n".join(lines_of_text).replace("$", r"\$"),
            fontsize=8,
            family="monospace",
            x=0.01,
            ha="left",
            linespacing=1.4,
        )
    return small_png(figure)


def small_png(figure: Any) -> bytes:
    """Return a figure of matplotlib as a PNG of few colours: a third of the size, and notebooks are kept in git."""
    from PIL import Image

    drawn, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi="figure")
    Image.open(drawn).convert("RGB").quantize(PALETTE).save(packed, format="png", optimize=True)
    return packed.getvalue()


def _draw(axis: Any, chart: Chart) -> None:
    axis.set_title(chart.title, fontsize=9)
    axis.set_xlabel(chart.x_label, fontsize=8)
    axis.set_ylabel(chart.y_label, fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    if chart.bars:
        axis.bar(
            [bar.label for bar in chart.bars],
            [bar.value for bar in chart.bars],
            color=[COLORS[bar.style % len(COLORS)] for bar in chart.bars],
        )
        return
    if chart.is_log:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.xaxis.set_minor_formatter(lambda value, _: "")
    elif all(float(x).is_integer() for line in chart.lines for x in line.x):
        axis.xaxis.get_major_locator().set_params(integer=True)
    for band in chart.bands:
        look: dict[str, Any] = {"alpha": 0.18, "color": "gray", "linewidth": 0}
        if not band.is_strong:
            look = {"facecolor": "none", "edgecolor": "gray", "hatch": "///", "alpha": 0.35, "linewidth": 0}
        axis.axvspan(band.low, band.high, **look)
    if chart.marker is not None:
        axis.axvline(chart.marker, color="gray", linewidth=0.8)
    for line in chart.lines:
        axis.plot(
            line.x,
            [math.nan if value is None else value for value in line.y],
            color=COLORS[line.style % len(COLORS)],
            dashes=DASHES[line.style % len(DASHES)] or (None, None),
            label=line.label,
            linewidth=1.8,
            marker="o" if len(line.x) == 1 else "",
        )
    if len(chart.lines) > 1:
        axis.legend(fontsize=7, frameon=False)
