"""A run as its files tell it; read while it runs, after it ended, and after it was killed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import ConfigError
from toolkit.training.metrics_file import read_rows

METRICS, SUMMARY, CONFIG, SAMPLES = "metrics.jsonl", "summary.json", "config.yaml", "samples.jsonl"
"""Files of a run."""
DEPTH = 3
"""Folders below the given one in which runs are looked for: those of a sweep, or of several days."""


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds."""

    folder: Path
    rows: Sequence[Mapping[str, Any]]
    """Lines of metrics.jsonl."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The resolved configuration by dotted key; empty: it is not there."""
    overrides: tuple[str, ...] = ()
    """What the command line asked for, as far as Hydra kept it."""
    summary: Mapping[str, Any] = field(default_factory=dict)
    """Results; empty: the run has not come to its end."""

    @property
    def name(self) -> str:
        """The last parts of its path, e.g. ``2026-11-30/10-00-00`` or ``3`` in a sweep."""
        parts = self.folder.resolve().parts
        return "/".join(parts[-2:]) if re.fullmatch(r"[\d-]+", parts[-1]) and len(parts) > 1 else parts[-1]

    @property
    def seed(self) -> int | None:
        """Seed of data, weights and sampling."""
        return self.settings.get("seed", self.summary.get("seed"))

    @cached_property
    def main(self) -> list[Mapping[str, Any]]:
        """The lines of the main phase, in order."""
        return [row for row in self.rows if row.get("phase") == "main"]

    @property
    def planned_steps(self) -> int | None:
        """Steps that the main phase was to have."""
        return self.settings.get("training.steps")

    @property
    def seconds(self) -> float | None:
        """Wall time of the whole run; for one that has not ended, of its steps."""
        if self.summary:
            return self.summary.get("wall_seconds")
        return sum(row.get("seconds") or 0.0 for row in self.rows) or None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Return the runs in these folders, or in folders below them, in natural order and each once.

    Raises:
        ConfigError: a path is not a folder or does not hold a run; a file of a run is broken.
    """
    folders: dict[Path, Path] = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise ConfigError(f"{path} is not a folder; give the output directory of a run, or of a sweep")
        in_path = folders_of_runs(path)
        if not in_path:
            raise ConfigError(f"{path} and the folders below it hold no {METRICS}: no run has made a step there")
        folders |= {folder.resolve(): folder for folder in in_path}
    return [read_run(folder) for folder in folders.values()]


def read_run(folder: Path) -> Run:
    """Return the run in `folder`.

    Raises:
        ConfigError: a file of it is broken; a line that is being written, the last one, is left out.
    """
    rows = read_rows(folder / METRICS, setting="")
    settings = _flat(_yaml(folder / CONFIG) or {}) if (folder / CONFIG).is_file() else {}
    kept = folder / ".hydra" / "overrides.yaml"
    overrides = tuple(str(each) for each in (_yaml(kept) or [])) if kept.is_file() else ()
    summary: dict[str, Any] = {}
    if (folder / SUMMARY).is_file():
        try:
            summary = json.loads((folder / SUMMARY).read_text())
            if not isinstance(summary, dict):
                raise ValueError("it is not a mapping")
        except ValueError as error:
            raise ConfigError(f"{folder / SUMMARY} cannot be read: {error}") from None
    return Run(folder, rows, settings, overrides, summary)


def folders_of_runs(path: Path) -> list[Path]:
    """Return the folders that hold a run, `path` or those below it, in natural order."""
    return sorted(_folders(path, DEPTH), key=_natural)


def _folders(path: Path, depth: int) -> Iterator[Path]:
    if (path / METRICS).is_file():
        yield path
    elif depth:
        for folder in path.iterdir():
            if folder.is_dir() and not folder.is_symlink():
                yield from _folders(folder, depth - 1)


def _natural(path: Path) -> list[Any]:
    """Return a key that sorts 10 after 9."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict) or not node:
        return {prefix.removesuffix("."): node}
    parts: dict[str, Any] = {}
    for key, value in node.items():
        parts |= _flat(value, f"{prefix}{key}.")
    return parts
