"""Tokens as a PNG, for exported notebooks and forges. No widgets here."""

from __future__ import annotations

from typing import Any

from toolkit.notebook.charts import small_png
from toolkit.notebook.token_model import TokenModel, title_of
from toolkit.notebook.token_records import SIGNALS, STATUS, TEXT, is_number

UP, DOWN, ONE = (0, 114, 178), (213, 94, 0), (204, 121, 167)
MARKS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (204, 121, 167), (213, 94, 0), (0, 114, 178))
"""The colours of tokens.js; above the middle is blue as in the page of the report."""
WIDTH, LINE = 110, 0.19
"""Characters of a line, and its height in inches."""
FONT_SIZE = 8.0
LETTER = 0.602 * FONT_SIZE / 72
"""Width of a letter of matplotlib's monospaced font, DejaVu Sans Mono, in inches."""
MOST_LINES = 40
Cell = tuple[int, int, str, Any, Any]
"""Line, column, text, value of the signal and status of a token."""


def color_of(value: Any, scale: dict[str, Any]) -> tuple[float, float, float] | None:
    """Return the colour of a token on white, each part in [0, 1]; None: no colour."""
    kind = scale["kind"]
    if kind == "status":
        if not value or str(value) not in scale["names"]:
            return None
        mark = MARKS[scale["names"].index(str(value)) % len(MARKS)]
        return mark[0] / 255, mark[1] / 255, mark[2] / 255
    if not is_number(value) or kind == "none":
        return None
    if kind == "two ways":
        share = max(-1.0, min(1.0, (value - scale["center"]) / scale["reach"]))
        color, share = (UP if share > 0 else DOWN), abs(share)
    else:
        share = max(0.0, min(1.0, (value - scale["low"]) / ((scale["high"] - scale["low"]) or 1.0)))
        color, share = ONE, 1 - share if scale["is_reversed"] else share
    red, green, blue = (1 - 0.85 * share * (1 - channel / 255) for channel in color)
    return red, green, blue


def scale_words(scale: dict[str, Any]) -> str:
    """Return what the colours mean."""
    if scale["kind"] == "two ways":
        low, high = scale["center"] - scale["reach"], scale["center"] + scale["reach"]
        return f" (orange {low:.3g}, white {scale['center']:g}, blue {high:.3g})"
    if scale["kind"] == "one way":
        pale, full = (scale["high"], scale["low"]) if scale["is_reversed"] else (scale["low"], scale["high"])
        return f" (white {pale:.3g}, pink {full:.3g})"
    return ""


def token_picture(model: TokenModel) -> bytes:
    """Return the first completions that are chosen, as far as they fit, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells, titles, row = _layout(model)
    lines = row + 3
    figure = Figure(figsize=(WIDTH * LETTER + 0.2, LINE * lines), dpi=100)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((0.1 / (WIDTH * LETTER + 0.2), 0.0, WIDTH * LETTER / (WIDTH * LETTER + 0.2), 1.0))
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(lines - 1, -1)
    axis.set_axis_off()
    scale = model.scale()
    title = f"{model.status()}, coloured by {SIGNALS.get(model.signal, 'nothing')}{scale_words(scale)}"
    axis.text(0, -0.4, title, fontsize=9)
    for line, title in titles:
        axis.text(0, line + 0.5, title, fontsize=7.5, color="#555555", va="center")
    texts: dict[int, str] = {}
    spans: dict[int, list[Any]] = {}
    for line, column, text, value, mark in cells:
        if mark:
            dots: dict[str, Any] = {"color": "black", "linewidth": 1.2, "linestyle": (0, (1, 1))}
            axis.plot([column, column + len(text.rstrip())], [line + 0.96] * 2, **dots)
        texts[line] = texts.get(line, "").ljust(column) + text
        color = color_of(value, scale)
        if color is not None:
            spans.setdefault(line, []).append(((column, len(text)), color))
    for line, colored in spans.items():
        parts, colors = zip(*colored, strict=True)
        axis.broken_barh(parts, (line + 0.06, 0.88), facecolors=colors, linewidth=0)
    for line, text in texts.items():
        shown = text.replace("$", r"\$")
        axis.text(0, line + 0.5, shown, fontsize=FONT_SIZE, family="monospace", va="center")
    return small_png(figure)


def _layout(model: TokenModel) -> tuple[list[Cell], list[tuple[int, str]], int]:
    """Return pieces of tokens as `Cell`s, titles as (line, text), and the number of lines."""
    cells: list[Cell] = []
    titles: list[tuple[int, str]] = []
    row = 0
    for index in model.chosen():
        if row >= MOST_LINES:
            break
        record = model.records[index]
        titles.append((row, title_of(record)))
        row, column = row + 1, 0
        values = record.tokens.get(model.signal) or [None] * len(record)
        marks = record.tokens.get(STATUS) or [None] * len(record)
        for text, value, mark in zip(record.tokens[TEXT], values, marks, strict=True):
            seen = text.replace("\n", "↵").replace("\t", " ")[:WIDTH]
            if column + len(seen) > WIDTH:
                row, column = row + 1, 0
            if row >= MOST_LINES:
                break
            cells.append((row, column, seen, value, mark))
            column += len(seen)
            if "\n" in text:
                row, column = row + 1, 0
        row += 2
    return cells, titles, row
