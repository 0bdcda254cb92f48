"""Tokens as a PNG, for exported notebooks and forges. No widgets here."""

from __future__ import annotations

import textwrap
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
HEAD_SIZE, TITLE_SIZE = 9.0, 7.5
"""Font sizes of the heading and of the line above a completion."""
DPI = 100
MARGIN = 0.1
"""Inches left and right."""
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

    cells, titles, end, row = picture_layout(model)
    width = WIDTH * text_width("m" * 100, FONT_SIZE, "monospace") / 100
    scale = model.scale()
    heading = f"{model.status()}, coloured by {SIGNALS.get(model.signal, 'nothing')}{scale_words(scale)}"
    head = wrapped(heading, HEAD_SIZE, width)
    lines = len(head) + row + bool(end)
    figure = Figure(figsize=(width + 2 * MARGIN, LINE * lines), dpi=DPI)
    FigureCanvasAgg(figure)
    axis = figure.add_axes((MARGIN / (width + 2 * MARGIN), 0.0, width / (width + 2 * MARGIN), 1.0))
    axis.set_xlim(0, WIDTH)
    axis.set_ylim(lines - len(head), -len(head))
    axis.set_axis_off()

    def write(line: int, text: str, size: float, **look: Any) -> None:
        axis.text(0, line + 0.5, text, fontsize=size, va="center", parse_math=False, **look)

    for number, text in enumerate(head):
        write(number - len(head), text, HEAD_SIZE)
    for line, title in [*titles, (row, end)]:
        first, *more = wrapped(title, TITLE_SIZE, width - 0.1)
        write(line, first + " …" * bool(more), TITLE_SIZE, color="#555555")
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
        write(line, text, FONT_SIZE, family="monospace")
    return small_png(figure)


def text_width(text: str, size: float, family: str = "sans-serif") -> float:
    """Return how wide a text is drawn, in inches: hinting rounds each letter to pixels."""
    from matplotlib.backends.backend_agg import RendererAgg
    from matplotlib.font_manager import FontProperties

    font = FontProperties(family=family, size=size)
    return float(RendererAgg(1, 1, DPI).get_text_width_height_descent(text, font, False)[0]) / DPI


def wrapped(text: str, size: float, width: float) -> list[str]:
    """Return a text in lines that are at most `width` inches wide, at least one."""
    letters = max(1, int(len(text) * width / max(text_width(text, size), 1e-9)))
    while len(lines := textwrap.wrap(text, letters) or [""]) > 1 or letters > 1:
        if all(text_width(line, size) <= width for line in lines):
            break
        letters -= 1
    return lines


def picture_layout(model: TokenModel) -> tuple[list[Cell], list[tuple[int, str]], str, int]:
    """Return pieces of tokens as `Cell`s, titles as (line, text), what is left out in words, and the lines."""
    cells: list[Cell] = []
    titles: list[tuple[int, str]] = []
    row = 0
    chosen = model.chosen()
    is_cut = False
    for index in chosen:
        if row + 1 >= MOST_LINES:  # no line for its tokens
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
                is_cut = True
                break
            cells.append((row, column, seen, value, mark))
            column += len(seen)
            if "\n" in text:
                row, column = row + 1, 0
        row += 2
    left = len(chosen) - len(titles)
    end = f"... and {left:,} more" if left else ""
    if is_cut:
        end = f"... the last one goes on{f', and {left:,} more' if left else ''}"
    return cells, titles, end, row
