"""How results show in a notebook: small tables that inherit the colours of the page, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

CELL = "text-align:left;padding:2px 10px 2px 0;vertical-align:top;border:0;background:none;color:inherit"


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]], note: str = "") -> str:
    """Return a table as HTML; everything is escaped.

    Args:
        title: shown above it.
        header: of the columns; empty: none.
        rows: of cells, shown as text.
        note: shown under it.
    """
    head = "".join(f'<th scope="col" style="{CELL};opacity:0.7">{escape(str(cell))}</th>' for cell in header)
    body = "".join(
        "<tr style='background:none'>"
        + "".join(f'<td style="{CELL}">{escape(str(cell))}</td>' for cell in row)
        + "</tr>"
        for row in rows
    )
    return (
        f'<div style="color:inherit"><b>{escape(title)}</b>'
        + (
            f'<table style="border-collapse:collapse;color:inherit">{f"<tr>{head}</tr>" if head else ""}{body}</table>'
            if body
            else ""
        )
        + (f'<div style="opacity:0.8">{escape(note)}</div>' if note else "")
        + "</div>"
    )


def html_text(title: str, text: str) -> str:
    """Return a `text` with its line breaks and columns as HTML, escaped, under a `title`."""
    style = "white-space:pre-wrap;color:inherit;background:none;margin:0"
    return f'<div style="color:inherit"><b>{escape(title)}</b><pre style="{style}">{escape(text)}</pre></div>'
