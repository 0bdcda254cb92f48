"""Tables as plain text and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

Rows = Sequence[Sequence[str]]


def aligned(rows: Rows, *, left: int = 1) -> str:
    """Return rows as columns of plain text: the first `left` ones to the left, the others, of numbers, to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def markdown_table(rows: Rows, *, left: int) -> str:
    """Return rows as a table in Markdown: the first row holds the headings, an empty cell reads ``-``."""
    lines = [" | ".join(cell.replace("|", "\\|").replace("``", "`") or "-" for cell in row) for row in rows]
    rule = "|".join("---" if column < left else "---:" for column in range(len(rows[0])))
    return "\n".join([f"| {lines[0]} |", f"|{rule}|", *(f"| {line} |" for line in lines[1:])])
