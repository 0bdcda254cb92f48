"""Records from files or a `datasets` repository, each with the file and line that it comes from; no torch here."""

from __future__ import annotations

import codecs
import csv
import importlib.util
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, a_type, did_you_mean, first_line, listed

MOST_SHOWN = 3
"""Bad rows that a message names."""
MOST_BYTES = 2**31 - 1
"""Longest field of a CSV file; the csv module's limit is 131,072 characters, which a long document exceeds."""


@dataclass(frozen=True)
class Record:
    """One row of data."""

    values: dict[str, Any]
    """Column -> value; JSON and Parquet have typed values, CSV has text."""
    where: str
    """File and line, or file and row, for messages."""


class Problems:
    """Collects what is wrong with rows; `check` raises at the end, or says how many rows are skipped."""

    def __init__(self, *, skip: bool) -> None:
        self.skip = skip
        self.messages: list[str] = []

    def add(self, where: str, reason: str) -> None:
        """Note that the row at `where` cannot be used."""
        self.messages.append(f"{where}: {reason}")

    def check(self, say: Callable[[str], None]) -> None:
        """Raise if there is a bad row; with `skip` pass a note to `say` instead.

        Raises:
            ConfigError: names the first bad rows.
        """
        if not self.messages:
            return
        number = len(self.messages)
        more = f" (and {number - 1} more bad row{'s' if number > 2 else ''})" if number > 1 else ""
        if not self.skip:
            raise ConfigError(
                f"{self.messages[0]}{more}; fix the data, or leave such rows out with task.on_bad_row=skip"
            )
        shown = "; ".join(self.messages[:MOST_SHOWN]) + ("; ..." if number > MOST_SHOWN else "")
        say(f"skipped {number} bad row{'s' if number > 1 else ''}: {shown}")


def read_records(path: str, problems: Problems, *, key: str, split: str, subset: str | None = None) -> list[Record]:
    """Read the rows of a file, of all files of a folder in the order of their names, or of a `datasets` repository.

    Args:
        path: a file (.jsonl, .json, .csv, .parquet), a folder of them, or the name of a repository.
        problems: rows that cannot be read are added to it.
        key: the override that names the path, for messages.
        split: of a repository whose name does not say it (``owner/name:test``).
        subset: of a repository: its configuration.

    Raises:
        ConfigError: there are no such files, they cannot be read, or the extra [data] is needed.
    """
    source = Path(path).expanduser()
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in READERS)
        if not files:
            raise ConfigError(f"{key}={path}: the folder holds no file of data; it may have {_suffixes()} files")
    elif source.is_file():
        files = [source]
    elif _looks_like_a_repository(path):
        name, _, part = path.partition(":")
        return _from_repository(name, key, part or split, subset)
    else:
        siblings = [file.name for file in source.parent.iterdir()] if source.parent.is_dir() else []
        is_pattern = any(sign in source.name for sign in "*?[")
        hint = "; a folder of files is read as one" if is_pattern else did_you_mean(source.name, siblings)
        raise ConfigError(f"{key}={path}: there is no such file or folder (looked for {source.resolve()}){hint}")
    records: list[Record] = []
    for file in files:
        if file.suffix.lower() not in READERS:
            remedy = REMEDIES.get(file.suffix.lower(), "")
            raise ConfigError(f"{key}={path}: the suffix {file.suffix!r} is not known; it may be {_suffixes()}{remedy}")
        try:
            records += READERS[file.suffix.lower()](file, problems)
        except OSError as error:
            raise ConfigError(f"{key}={file}: cannot be read: {error.strerror or error}") from None
    if not records and not problems.messages:
        raise ConfigError(f'{key}={path}: there are no rows; give one a line, such as {{"prompt": "1+1="}}')
    return records


def _suffixes() -> str:
    return listed(READERS)


def _looks_like_a_repository(path: str) -> bool:
    owner, slash, name = path.partition("/")
    return (
        bool(owner and slash and name) and "/" not in name and not path.startswith((".", "~")) and not Path(path).suffix
    )


# -------------------------------------------------------------------- text files


def _lines_of(file: Path, problems: Problems) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers; lines that are not UTF-8 are problems."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ConfigError(f"{file}: it is UTF-16; save it as UTF-8")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                problems.add(f"{file}, line {number}", f"byte {line[error.start]:#x} is not UTF-8")
                yield number, ""  # readers skip an empty line, and those after it keep their numbers


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"two fields have the name {next(name for name in names if names.count(name) > 1)!r}")
    return values


def _read_jsonl(file: Path, problems: Problems) -> list[Record]:
    records = []
    for number, line in _lines_of(file, problems):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        try:
            values = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            if number == 1 and line.strip() in ("{", "["):
                raise ConfigError(
                    f"{where}: it is only {line.strip()!r}; in a .jsonl file each object is on one line, a list of "
                    "objects over several lines is a .json file"
                ) from None
            problems.add(where, f"it is not JSON ({error.msg} at character {error.pos + 1}{_remedy_of(line)})")
            continue
        except ValueError as error:  # of _unique_keys
            problems.add(where, str(error))
            continue
        if isinstance(values, dict):
            records.append(Record(values, where))
        else:
            remedy = "; a list of objects is a .json file" if isinstance(values, list) else ""
            kind = type(values).__name__
            problems.add(where, f'it is a {kind}; it must be an object, such as {{"prompt": "1+1="}}{remedy}')
    return records


def _remedy_of(line: str) -> str:
    """Say what a line that is not JSON looks like; empty if it looks like nothing known."""
    if line.lstrip().startswith(("{'", "[{'")):
        return ": JSON has double quotes; write lines with json.dumps"
    return ": no comma follows an object" if line.rstrip().endswith("},") else ""


def _read_json(file: Path, problems: Problems) -> list[Record]:
    try:
        rows = json.loads(file.read_bytes().decode("utf-8-sig"), object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        hint = "; if it has one object a line, call it .jsonl" if error.msg == "Extra data" else ""
        raise ConfigError(f"{file}, line {error.lineno}: it is not JSON ({error.msg}){hint}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(rows, list):
        raise ConfigError(f"{file}: it holds {a_type(rows)}; it must be a list of objects, or .jsonl")
    records = []
    for number, values in enumerate(rows, 1):
        if isinstance(values, dict):
            records.append(Record(values, f"{file}, row {number}"))
        else:
            problems.add(f"{file}, row {number}", f"it is {a_type(values)}; it must be an object")
    return records


def _read_csv(file: Path, problems: Problems) -> list[Record]:
    csv.field_size_limit(MOST_BYTES)
    reader = csv.reader(line for _, line in _lines_of(file, problems))
    header = next(reader, [])
    if len(header) == 1 and (";" in header[0] or "\t" in header[0]):
        sign = "semicolons" if ";" in header[0] else "tabs"
        raise ConfigError(f"{file}, line 1: its columns are separated by {sign}; separate them by commas")
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise ConfigError(f"{file}, line 1: two columns have the name {twice[0]!r}; rename one")
    records = []
    try:
        for row in reader:
            where = f"{file}, line {reader.line_num}"
            if len(row) == len(header):
                records.append(Record(dict(zip(header, row, strict=True)), where))
            elif row:
                problems.add(where, f"it has {len(row)} fields, the header has {len(header)}")
    except csv.Error as error:
        raise ConfigError(f"{file}, line {reader.line_num}: {error}") from None
    return records


# -------------------------------------------------------------------- by other packages


def _need(package: str, what: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f'{what} needs the package {package!r}: pip install "rl-loss-toolkit[data]"')


def _read_parquet(file: Path, problems: Problems) -> list[Record]:
    _need("pyarrow", f"{file}: a Parquet file")
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ConfigError(f"{file}: it cannot be read as Parquet: {first_line(error)}") from None
    return [Record(values, f"{file}, row {number}") for number, values in enumerate(rows, 1)]


def _from_repository(path: str, key: str, split: str, subset: str | None) -> list[Record]:
    _need("datasets", f"{key}={path}: there is no such file; as the name of a repository it")
    import datasets

    try:
        rows = datasets.load_dataset(path, subset, split=split)
    except Exception as error:  # errors of the network, the hub and the data have no common class
        raise ConfigError(
            f"{key}={path}: there is no such file, and the repository cannot be loaded "
            f"({type(error).__name__}: {first_line(error)}); check the name, task.split, task.subset and the network"
        ) from None
    return [Record(dict(values), f"{path}[{split}], row {number}") for number, values in enumerate(rows, 1)]


READERS: dict[str, Callable[[Path, Problems], list[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix of a file, in small letters -> what reads it."""
REMEDIES = {
    ".ndjson": "; call it .jsonl",
    ".tsv": "; separate the columns by commas and call it .csv",
    ".gz": "; unpack it",
    ".zst": "; unpack it",
    ".zip": "; unpack it",
}
"""Suffix that is not read -> what to do."""
