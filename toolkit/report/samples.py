"""samples.jsonl: completions with their rewards, and records of their tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError
from toolkit.report.runs import SAMPLES, Run

SCHEMA = 1
"""Version of the lines: a reader refuses later ones."""


def read_samples(runs: Sequence[Run], most: int | None) -> tuple[str, list[dict[str, Any]]]:
    """Return what was chosen in words, and the samples for a page, each with the index of its run.

    Args:
        runs: in the order of the page.
        most: samples over all runs, evenly chosen; None: all.

    Raises:
        ConfigError: a line is broken or of a later version; the last one, which is being written, is left out.
    """
    paths = [run.folder / SAMPLES for run in runs]
    counts = [_count(path) for path in paths]
    total = sum(counts)
    stride = 1 if most is None else max(1, -(-total // most))
    samples = []
    for index, (path, count) in enumerate(zip(paths, counts, strict=True)):
        if not count:
            continue
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file):
                sample = _sample(line, path, number, is_last=number == count - 1) if number % stride == 0 else None
                if sample is not None:
                    samples.append({**sample, "run": index})
    words = f"All {total:,} samples that were kept."
    if stride > 1:
        words = f"{len(samples):,} of {total:,} samples that were kept, one in {stride}; --samples all shows all."
    return words, samples


def _count(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)


def _sample(line: str, path: Path, number: int, *, is_last: bool) -> dict[str, Any] | None:
    try:
        sample: dict[str, Any] = json.loads(line)
    except ValueError as error:
        if is_last:
            return None
        raise ConfigError(f"{path}, line {number + 1} cannot be read: {error}") from None
    if sample.get("schema", SCHEMA) > SCHEMA:
        raise ConfigError(f"{path} was written by a later version: schema {sample['schema']}, this one reads {SCHEMA}")
    return sample
