"""Records from whatever `token_view` is called with: a run, a file, items, samples. No widgets here."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from toolkit.errors import DataError, a_type
from toolkit.losses.items import RLLossContextInputItem
from toolkit.notebook.readers import items, prime_rl, samples, trl, verl
from toolkit.notebook.token_records import TEXT, TokenRecord
from toolkit.report.runs import METRICS, SAMPLES, SUMMARY, Run

ACCEPTED = (
    "a run's folder or its samples.jsonl, a Parquet file of TRL, a .jsonl file of verl or prime-rl, items, or samples "
    "as mappings"
)


def records_from(
    source: Any, *, decode: Callable[[int], str] | None = None, most: int | None = None
) -> list[TokenRecord]:
    """Return the completions of a source; see `token_view`.

    Raises:
        DataError: the source is empty, or of a kind that is not known.
        ConfigError: a line of a file is broken.
    """
    if isinstance(source, Run):
        source = source.folder
    if isinstance(source, (str, os.PathLike)):
        records = _of_path(Path(source), most)
        where = str(source)
    else:
        one = isinstance(source, (RLLossContextInputItem, TokenRecord, Mapping))
        if not one and not isinstance(source, Iterable):
            raise DataError(f"token_view got {a_type(source)}; give {ACCEPTED}")
        records = [record for each in ([source] if one else source) for record in _of_object(each, decode)]
        where = "the source"
    if not records:
        raise DataError(f"{where} holds no completions; tracker.samples=some keeps a few of every step of a run")
    return records if most is None else records[:: max(1, -(-len(records) // most))]


def _of_path(path: Path, most: int | None) -> list[TokenRecord]:
    if path.is_dir():
        if (path / SAMPLES).is_file():
            return samples.read(path, most)
        _check_has_samples(path)
        files = sorted([*path.glob("*.parquet"), *path.glob("*.jsonl")], key=lambda each: (len(each.name), each.name))
        if not files:
            raise DataError(f"{path} holds no {SAMPLES} and no dump of completions; give {ACCEPTED}")
        return [record for file in files for record in _of_path(file, None)]
    if not path.is_file():
        if path.name == SAMPLES:
            _check_has_samples(path.parent)
        raise DataError(f"{path} does not exist; give {ACCEPTED}")
    if path.suffix == ".parquet":
        return trl.read(path)
    if path.name == SAMPLES:
        return samples.read(path.parent, most)
    lines = _lines(path)
    if all(map(verl.is_line, lines)):
        return verl.of_lines(lines)
    if all(map(prime_rl.is_line, lines)):
        return prime_rl.of_lines(lines)
    if all("completion" in line for line in lines):
        return [samples.of_sample(line) for line in lines]
    keys = ", ".join(list(lines[0])[:8])
    raise DataError(f"{path} is not a dump that is known: its lines have {keys}; give {ACCEPTED}")


def _check_has_samples(folder: Path) -> None:
    """Raise if `folder` is that of a run, which has kept no samples."""
    if any((folder / name).exists() for name in (METRICS, SUMMARY, ".hydra")):
        raise DataError(f"no {SAMPLES} in {folder}; tracker.samples=none keeps none, tracker.samples=some a few")


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.endswith("\n") and number > 1:
                break  # it is being written
            try:
                line = json.loads(text)
            except ValueError as error:
                raise DataError(f"{path}, line {number} cannot be read: {error}") from None
            if not isinstance(line, dict):
                raise DataError(f"{path}, line {number} is not a mapping")
            lines.append(line)
    if not lines:
        raise DataError(f"{path} is empty")
    return lines


def _of_object(each: Any, decode: Callable[[int], str] | None) -> list[TokenRecord]:
    if isinstance(each, TokenRecord):
        return [each]
    if isinstance(each, RLLossContextInputItem):
        return items.of_items([each], decode)
    if isinstance(each, Mapping):
        tokens = each.get("tokens")
        if "completion" not in each and not (isinstance(tokens, Mapping) and TEXT in tokens):
            has = f"one has {', '.join(map(str, list(each)[:8]))}" if each else "one is empty"
            raise DataError(f"a sample needs the key 'completion', or 'tokens' with the key 'text'; {has}")
        return [samples.of_sample(each)]
    raise DataError(f"token_view got {a_type(each)} among its completions; give {ACCEPTED}")
