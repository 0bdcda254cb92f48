"""Our ``samples.jsonl``: completions with records of their tokens where the run kept them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.notebook.token_records import STATUS, TEXT, TokenRecord, record_of, record_of_text
from toolkit.report.runs import Run
from toolkit.report.samples import read_samples

UNMARKED = ("learns", "unscored")
"""Statuses of tokens that nothing clipped or rejected."""


def read(folder: Path, most: int | None = None) -> list[TokenRecord]:
    """Return the samples of a run, evenly chosen if there are more than `most`.

    Raises:
        ConfigError: a line is broken or of a later version.
    """
    _, samples = read_samples([Run(folder, ())], most)
    return [of_sample(sample) for sample in samples]


def of_sample(sample: Mapping[str, Any]) -> TokenRecord:
    """Return one line as a record."""
    fields = {
        "prompt": str(sample.get("prompt") or ""),
        "reward": sample.get("reward"),
        "step": sample.get("step"),
        "group": str(sample.get("prompt_index", "")),
        "sample": sample.get("sample") or 0,
        "details": {
            "phase": sample.get("phase") if sample.get("phase") != "main" else None,
            "ended by": sample.get("stop"),
            **(sample.get("parts") or {}),
        },
    }
    tokens = sample.get("tokens")
    if tokens and tokens.get(TEXT):
        lists = {name: values for name, values in tokens.items() if isinstance(values, list)}
        if STATUS in lists:
            lists[STATUS] = [None if status in UNMARKED else status for status in lists[STATUS]]
        return record_of(lists, advantage=sample.get("advantage"), **fields)
    return record_of_text(str(sample.get("completion") or ""), sample.get("advantage"), **fields)
