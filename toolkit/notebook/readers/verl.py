"""verl's ``<step>.jsonl`` (``trainer.rollout_data_dir``): ``input``, ``output``, ``score``, ``step``; no tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from toolkit.notebook.token_records import TokenRecord, is_number, record_of_text

KNOWN = ("input", "output", "score", "step", "gts")


def is_line(line: Mapping[str, Any]) -> bool:
    """Whether a line is one of verl's."""
    return "input" in line and "output" in line


def of_lines(lines: Iterable[Mapping[str, Any]]) -> list[TokenRecord]:
    """Return lines as records."""
    records, seen = [], dict[tuple[Any, str], int]()
    for line in lines:
        prompt = str(line["input"])
        key = (line.get("step"), prompt)
        seen[key] = seen.get(key, -1) + 1
        details = {name: value for name, value in line.items() if name not in KNOWN and is_number(value)}
        records.append(
            record_of_text(
                str(line["output"]),
                prompt=prompt,
                reward=line.get("score"),
                step=line.get("step"),
                group=prompt[-40:],
                sample=seen[key],
                details=details,
            )
        )
    return records
