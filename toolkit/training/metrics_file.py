"""metrics.jsonl as a process that was killed leaves it. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, warn_once


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of metrics; one that was cut at the end is dropped with a note.

    Raises:
        ConfigError: another line cannot be read.
    """
    lines = path.read_bytes().split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict) or not isinstance(row.get("step"), int) or "phase" not in row:
                raise ValueError("not the metrics of a step")
        except ValueError as error:  # of JSON or of the encoding
            if number < len(lines):
                raise ConfigError(
                    f"training.resume: line {number} of {path} cannot be read ({error}); repair or remove the file"
                ) from None
            warn_once(f"{path}: the last line was cut, so it is dropped")
            continue
        rows.append(row)
    return rows
