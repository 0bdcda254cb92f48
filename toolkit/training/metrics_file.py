"""metrics.jsonl as a run leaves it, also one that was killed, and whether anything was learnt. No torch here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, warn_once

SCHEMA = 1
"""Version of a line; a reader refuses later ones. tutorials/reference/run_files.md says what a line holds."""


def as_line(row: Mapping[str, Any]) -> str:
    """Return the line of metrics.jsonl that `read_rows` gives back as `row`."""
    return json.dumps({"schema": SCHEMA, **row}) + "\n"


def read_rows(path: Path, *, setting: str = "training.resume: ") -> list[dict[str, Any]]:
    """Return the lines of a file of metrics without their version; one cut at the end is dropped with a note.

    Args:
        path: of the file.
        setting: what the error begins with.

    Raises:
        ConfigError: another line cannot be read, or a later version wrote one.
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
                    f"{setting}line {number} of {path} cannot be read ({error}); repair or remove the file"
                ) from None
            warn_once(f"{path}: the last line was cut, so it is dropped")
            continue
        version = row.pop("schema", SCHEMA)  # lines of versions without it are those of the first
        if version > SCHEMA:
            raise ConfigError(
                f"{setting}{path} was written by a later version: schema {version}, this one reads {SCHEMA}"
            )
        rows.append(row)
    return rows


def why_nothing_was_learnt(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Return why RL has made no update, from the lines of metrics.jsonl; None: it has, or there was another reason."""
    main = [row for row in rows if row["phase"] == "main"]
    if not main or any("grad_norm" in row or "uniform_groups" not in row for row in main):
        return None
    if all(row.get("reward") is None for row in main):
        return "no reward applied to any completion: all returned None"
    if all(row["uniform_groups"] in (None, 1) for row in main):
        return (
            "the rewards were equal in every group; debug=dry_run shows completions with their rewards: a reward in "
            "finer steps, easier prompts, a larger rollout.group_size or a warm-up may tell them apart"
        )
    return None
