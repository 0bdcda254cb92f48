"""Rows of a user's data, checked: a prompt, columns for rewards, perhaps something to imitate. No torch here."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, a_type, did_you_mean, listed, warn_once
from toolkit.tasks import chat, split
from toolkit.tasks.records import Problems, Record, read_records

OTHER_NAMES = ("prompt", "question", "problem", "instruction", "input", "messages", "query", "text")
"""What other data calls the prompt."""
COMPLETIONS = ("completion", "response", "output", "chosen", "target", "answer", "solution")
"""What other data calls the completion."""
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue", "dialog")
"""What other data calls a whole conversation."""
AS_TEXT = re.compile(r'\s*\[\s*\{\s*["\'](role|content)["\']\s*:')
"""How a text begins that holds a list of chat messages: a column of a CSV file, or JSON in JSON."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows come from and what is in them; for the fields see `toolkit.tasks.config.DatasetConfig`."""

    path: str
    prompt_column: str
    prompt_template: str | None
    completion_column: str
    messages_column: str
    answer_column: str
    tools_column: str
    as_chat: bool
    system_prompt: str | None
    heldout: float
    heldout_path: str | None
    heldout_column: str | None
    num_heldout: int
    on_bad_row: str
    split: str
    subset: str | None
    with_completions: bool
    """Whether every row needs something to imitate."""


@dataclass(frozen=True)
class Row:
    """One row, checked, as it is in the data."""

    prompt: str | list[chat.Message]
    completion: str | list[chat.Message] | None
    columns: dict[str, Any]
    where: str
    entry: Any = None
    """Any other data for a verifier."""


@dataclass(frozen=True)
class Loaded:
    """The rows of a run."""

    train: list[Row]
    heldout: list[Row]
    columns: tuple[str, ...]
    """Names that rewards can take."""
    all_columns: tuple[str, ...] = ()
    """Names in the data."""


def load(source: Source, seed: int) -> Loaded:
    """Read, check and divide the rows; the same unchanged files are not read again.

    Raises:
        ConfigError: a file, a column or a row is wrong; names it.
    """
    stamps = tuple(_stamp(path) for path in (source.path, source.heldout_path) if path is not None)
    return _load(source, seed, stamps)


def _stamp(path: str) -> tuple[Any, ...]:
    root = Path(path).expanduser()
    files = sorted(root.iterdir()) if root.is_dir() else [root] if root.is_file() else []
    return tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@lru_cache(maxsize=4)
def _load(source: Source, seed: int, stamps: tuple[Any, ...]) -> Loaded:
    problems = Problems(skip=source.on_bad_row == "skip")
    reading: dict[str, Any] = {"split": source.split, "subset": source.subset}
    records = read_records(source.path, problems, key="task.path", **reading)
    rows = _rows(source, records, problems, "task.path")
    held_rows: list[Row] = []
    if source.heldout_path is not None:
        held_records = read_records(source.heldout_path, problems, key="task.heldout_path", **reading)
        held_rows = _rows(source, held_records, problems, "task.heldout_path")
        records = [*records, *held_records]
    elif source.heldout_column is not None:
        rows, held_rows = _by_column(source.heldout_column, rows, problems)
    problems.check(note)
    if source.heldout_path is None and source.heldout_column is None:
        train, heldout = split.by_share(rows, source.heldout, source.num_heldout, seed, _content)
    else:
        train, heldout = split.apart(rows, held_rows, source.num_heldout, seed, _content)
    if not train:
        raise ConfigError(f"task.path={source.path}: no row is left to train on{_why_none(source, rows, heldout)}")
    if not heldout and source.heldout > 0 and source.heldout_path is None and source.heldout_column is None:
        note(
            "nothing is held out, so nothing is measured: all rows have the same prompt (task.heldout_path=... "
            "names others)"
        )
    if not heldout and (source.heldout_path is not None or source.heldout_column is not None):
        raise ConfigError("no row is held out; for a run without a measurement leave it out and set task.heldout=0")
    if source.heldout_path is not None or source.heldout_column is not None:
        doubled = len(rows) - len(train)
        if doubled:
            note(f"{doubled} rows are not trained on: their prompts are held out, too")
    names = dict.fromkeys(name for record in records for name in record.values)
    hidden = (source.prompt_column, source.completion_column, source.messages_column)
    columns = [name for name in names if name not in hidden or name == source.answer_column]
    if any("answer" in row.columns for row in rows) and "answer" not in columns:
        columns.append("answer")
    return Loaded(train, heldout, tuple(columns), tuple(names))


def _why_none(source: Source, rows: Sequence[Row], heldout: Sequence[Row]) -> str:
    if not rows:
        return ": every row was skipped" if source.on_bad_row == "skip" else ""
    return f"; {len(heldout)} of {len(rows)} are held out; set task.heldout=0 to train on all"


def note(text: str) -> None:
    """Warn once, on one process of a run."""
    if os.environ.get("RANK", "0") in ("", "0", "-1"):
        warn_once(text)


def _content(row: Row) -> str:
    return split.content_of(row.prompt)


def _by_column(name: str, rows: Sequence[Row], problems: Problems) -> tuple[list[Row], list[Row]]:
    if not any(name in row.columns for row in rows):
        columns = list(dict.fromkeys(column for row in rows for column in row.columns))
        hint = did_you_mean(name, columns)
        raise ConfigError(f"task.heldout_column={name} is not a column{hint}; {_there_are(columns)}")
    sides: dict[bool, list[Row]] = {True: [], False: []}
    for row in rows:
        side = split.is_heldout(row.columns.get(name))
        if side is None:
            problems.add(row.where, f"its {name} is {row.columns[name]!r}; write true or false, or test or train")
        else:
            sides[side].append(row)
    return sides[False], sides[True]


# -------------------------------------------------------------------- one row


def _there_are(columns: Sequence[str]) -> str:
    return f"the columns are {listed(columns, 'and')}" if columns else "there are no columns"


def _rows(source: Source, records: Sequence[Record], problems: Problems, key: str) -> list[Row]:
    if not records:
        return []
    columns = list(dict.fromkeys(name for record in records for name in record.values))
    template = _template(source.prompt_template, columns)
    needed = [source.prompt_column] if template is None else []
    if source.with_completions and source.messages_column in columns:
        needed = []
    for name in needed:
        if name not in columns and source.with_completions and {*CONVERSATIONS} & {*columns}:
            raise ConfigError(f"{key}: there is no column {name!r}{completion_remedy(columns)}; {_there_are(columns)}")
        if name not in columns:
            raise ConfigError(_no_column(name, "task.prompt_column", OTHER_NAMES, columns, key))
    if source.with_completions and not {source.completion_column, source.messages_column} & {*columns}:
        raise ConfigError(
            f"{key}: supervised learning needs a column {source.completion_column!r} beside the prompt (another name: "
            f"task.completion_column=...), or a column {source.messages_column!r} with whole conversations"
            f"{completion_remedy(columns)}; {_there_are(columns)}"
        )
    for setting, name, default in (
        ("task.answer_column", source.answer_column, "answer"),
        ("task.tools_column", source.tools_column, "tools"),
    ):
        if name not in columns and name != default:
            raise ConfigError(
                f"{key}: there is no column {name!r}, which {setting} names{did_you_mean(name, columns)}; "
                f"{_there_are(columns)}"
            )
    rows: list[Row] = []
    for record in records:
        try:
            rows.append(_row(source, record, template))
        except ValueError as error:
            problems.add(record.where, str(error))
    if source.system_prompt is not None and rows and all(isinstance(row.prompt, str) for row in rows):
        raise ConfigError("task.system_prompt has no effect on prompts that are text; set task.as_chat=true, too")
    return rows


def completion_remedy(columns: Collection[str]) -> str:
    """Return the override that names the column to imitate, by what other data calls it; empty if there is none."""
    for setting, others in (("task.messages_column", CONVERSATIONS), ("task.completion_column", COMPLETIONS)):
        likely = next((other for other in others if other in columns), None)
        if likely:
            return f"; try: {setting}={likely}"
    return ""


def _no_column(name: str, setting: str, others: Sequence[str], columns: Sequence[str], key: str) -> str:
    likely = next((other for other in others if other in columns), None)
    hint = did_you_mean(name, columns) or (f"; try: {setting}={likely}" if likely else "")
    return f"{key}: there is no column {name!r}{hint}; {_there_are(columns)} (or use task.prompt_template)"


def _template(text: str | None, columns: Sequence[str]) -> Callable[[dict[str, Any]], str] | None:
    """Return what fills a template in from the columns of a row; it raises ValueError if a row lacks one."""
    if text is None:
        return None
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise ConfigError(
            f"task.prompt_template={text!r}: {error}; a brace that is meant as one is written twice: {{{{ and }}}}"
        ) from None
    for name in names:
        if not name:
            raise ConfigError(f"task.prompt_template={text!r}: {{}} names no column; {_there_are(columns)}")
        if name not in columns:
            raise ConfigError(
                f"task.prompt_template={text!r}: {name!r} is not a column{did_you_mean(name, columns)}; "
                f"{_there_are(columns)}; a brace that is meant as one is written twice"
            )
    if not names:
        raise ConfigError(f"task.prompt_template={text!r} names no column, so every prompt is the same; write {{name}}")

    def fill(values: dict[str, Any]) -> str:
        missing = [name for name in names if values.get(name) is None]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}, which task.prompt_template names")
        try:
            return text.format(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"task.prompt_template={text!r} cannot be filled in: {error}") from None

    return fill


def _row(source: Source, record: Record, template: Callable[[dict[str, Any]], str] | None) -> Row:
    values = record.values
    prompt: Any
    completion = values.get(source.completion_column)
    if template is None and source.prompt_column not in values and source.messages_column in values:
        prompt, completion = _conversation(values[source.messages_column], source.messages_column)
    elif template is None:
        if source.prompt_column not in values:
            raise ValueError(f"it has no {source.prompt_column!r}")
        prompt = values[source.prompt_column]
    else:
        prompt = template(values)
    if prompt is None:
        raise ValueError("its prompt is null")
    if not isinstance(prompt, (str, list)):
        remedy = f" (task.prompt_template='{{{source.prompt_column}}}' makes a text of it)"
        raise ValueError(
            f"its prompt is of type {type(prompt).__name__}; it must be a text or a list of chat messages"
            f"{remedy if isinstance(prompt, (int, float)) else ''}"
        )
    if isinstance(prompt, str) and not prompt.strip():
        raise ValueError("its prompt is empty")
    if isinstance(prompt, str) and AS_TEXT.match(prompt):
        raise ValueError("its prompt is a text with chat messages in it; write the list itself (in JSON or Parquet)")
    prompt = with_system(prompt, as_chat=source.as_chat, system_prompt=source.system_prompt)
    if isinstance(prompt, list):
        wrong = chat.wrong_with_messages(prompt)
        if wrong is None and prompt[-1]["role"] == "assistant":
            wrong = "the last message is the assistant's, which is what the policy is to write; end with the user's"
        if wrong is not None:
            raise ValueError(f"its prompt: {wrong}")
    completion = _completion(source, completion)
    columns = dict(values)
    answer = values.get(source.answer_column)
    if answer is None and isinstance(completion, str):
        answer = completion
    if answer is not None:
        columns["answer"] = answer
    for name in (source.prompt_column, source.completion_column, source.messages_column):
        if name != source.answer_column and name != "answer":
            columns.pop(name, None)
    return Row(prompt, completion, columns, record.where)


def with_system(
    prompt: str | list[chat.Message], *, as_chat: bool, system_prompt: str | None
) -> str | list[chat.Message]:
    """Return chat messages with the system prompt before them, a text as the user's if `as_chat`; a text else."""
    if isinstance(prompt, str):
        if not as_chat:
            return prompt
        prompt = [{"role": "user", "content": prompt}]
    if system_prompt is not None and not (prompt and dict(prompt[0]).get("role") == "system"):
        return [{"role": "system", "content": system_prompt}, *prompt]
    return prompt


def _conversation(messages: Any, name: str) -> tuple[list[chat.Message], list[chat.Message] | None]:
    """Return the prompt of a conversation, up to its last answer, and the rest."""
    if not isinstance(messages, list):
        raise ValueError(f"its {name} is {a_type(messages)}; it must be a list of chat messages")
    wrong = chat.wrong_with_messages(messages)
    if wrong is not None:
        raise ValueError(f"its {name}: {wrong}")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return messages, None
    if answers[-1] == 0:
        raise ValueError(f"its {name} begin with the assistant's; put the user's before")
    return messages[: answers[-1]], messages[answers[-1] : answers[-1] + 1]


def _completion(source: Source, completion: Any) -> str | list[chat.Message] | None:
    if isinstance(completion, list):
        wrong = chat.wrong_with_messages(completion)
        if wrong is not None:
            raise ValueError(f"its completion: {wrong}")
    elif completion is not None and not isinstance(completion, str):
        completion = str(completion)
    if source.with_completions and not completion:
        raise ValueError(f"it has no {source.completion_column!r} to learn from")
    return completion
