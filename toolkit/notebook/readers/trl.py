"""TRL's ``completions/completions_00001.parquet`` (``log_completions=True``): no tokens, one row a completion.

Columns of TRL 1.16: ``step``, ``prompt``, ``completion``, ``advantage``, and one for each reward function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import DataError
from toolkit.notebook.token_records import TokenRecord, is_number, record_of_text

KNOWN = ("step", "prompt", "completion", "advantage")


def read(path: Path) -> list[TokenRecord]:
    """Return the rows of a Parquet file.

    Raises:
        DataError: pyarrow is missing, or a column of TRL's is.
    """
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(f'{path} needs the package pyarrow: pip install "rl-loss-toolkit[data]"') from None
    rows = pyarrow.parquet.read_table(path).to_pylist()
    return of_rows(rows, str(path))


def of_rows(rows: Iterable[Mapping[str, Any]], where: str = "the table") -> list[TokenRecord]:
    """Return rows as records; the reward is the sum of the columns of reward functions."""
    records, seen = [], dict[tuple[Any, str], int]()
    for row in rows:
        missing = [name for name in ("prompt", "completion") if name not in row]
        if missing:
            raise DataError(f"{where} has no column {missing[0]!r}; it has {', '.join(row)}")
        parts = {name: value for name, value in row.items() if name not in KNOWN and is_number(value)}
        prompt = text_of(row["prompt"])
        key = (row.get("step"), prompt)
        seen[key] = seen.get(key, -1) + 1
        records.append(
            record_of_text(
                text_of(row["completion"]),
                row.get("advantage"),
                prompt=prompt,
                reward=sum(parts.values()) if parts else None,
                step=row.get("step"),
                group=prompt[:40],
                sample=seen[key],
                details=parts if len(parts) > 1 else {},
            )
        )
    return records


def text_of(messages: Any) -> str:
    """Return a prompt or completion as text, whether it is text or a list of messages."""
    if isinstance(messages, (list, tuple)):
        return "\n".join(str(each.get("content") or "") for each in messages if isinstance(each, Mapping))
    return str(messages or "")
