"""The words of other projects as a table: for ``--from``, and for ``tutorials/reference/words.md``; no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.peers import COMPUTED, VALUE, Answer, Project, Word, projects, words_of
from toolkit.peers.batch_fields import BATCH, NAMES

ALL = "all"
"""Stands for all projects after ``--from``."""
COMMAND = "python -m toolkit.explain --from all --markdown tutorials/reference/words.md"
INTRODUCTION = f"""# Words people bring along

What other projects call the options of a loss and of its training run, and what to write here instead.
`toolkit-explain --from <project>` prints one of these tables, and a message about an unknown setting looks it up.
`...` stands for your value. Every override below is composed by a test.

Made by `{COMMAND}` from `toolkit/peers/words.toml`.
"""


def table(name: str, wanted: Sequence[str] = ()) -> str:
    """Return the words of one project, or of all, as plain text.

    Args:
        name: of the project.
        wanted: parts of the words to show; none: all.

    Raises:
        ConfigError: there is no such project, or it has no such word.
    """
    parts = [_plain(project, wanted) for project in _chosen(name)]
    if not any(parts):
        known = {word.name for project in _chosen(name) for word in project.words}
        raise ConfigError(
            f"{name} has no word like {listed(wanted)}{did_you_mean(wanted[0], known)}; --from {name} lists all"
        )
    return "\n\n".join(part for part in parts if part)


def markdown(name: str = ALL) -> str:
    """Return the same as Markdown: a page with a table for each project.

    Raises:
        ConfigError: there is no such project.
    """
    fields = [_fields()] if name == ALL else []
    return "\n".join([INTRODUCTION, *(_section(project) for project in _chosen(name)), *fields])


def _chosen(name: str) -> list[Project]:
    return list(projects().values()) if name == ALL else [words_of(name)]


def _plain(project: Project, wanted: Sequence[str]) -> str:
    """Return the table of a project; empty if none of its words is wanted."""
    words = [word for word in project.words if not wanted or any(part.lower() in word.name.lower() for part in wanted)]
    rows = [row for word in words for row in _rows(word)]
    if not rows:
        return ""
    width = max(len(called) for called, _, _ in rows) + 2
    lines = [f"{_title(project)}: {project.read}"]
    for called, ways, remark in rows:
        cells = [*ways[:1], *(f"or {way}" for way in ways[1:]), *([f"({remark})"] if remark else [])]
        for index, cell in enumerate(cells):
            lines.append(f"  {called if index == 0 else '':<{width}}{cell}")
    return "\n".join(lines)


def _section(project: Project) -> str:
    lines = [f"## {_title(project)}", "", f"Read from {project.read}.", ""]
    lines += ["| there | here | remark |", "|---|---|---|"]
    for called, ways, remark in (row for word in project.words for row in _rows(word)):
        here = " or ".join(f"`{way}`" for way in ways) or "no counterpart"
        lines.append(f"| `{called}` | {here} | {remark.removeprefix('no counterpart: ') or '-'} |")
    return "\n".join([*lines, ""])


def _fields() -> str:
    """Return the table of the fields of a batch."""
    lines = [
        "## Fields of a batch",
        "",
        "What `LossRunner` and items answer to; from `toolkit/peers/batch_fields.py`.",
        "",
    ]
    lines += ["| there | project | here | remark |", "|---|---|---|---|"]
    for name, there in NAMES.items():
        here = " or ".join(f"`{field}`" for field in there.ours if field in BATCH) or "no counterpart"
        remark = there.remark or ("-" if here != "no counterpart" else there.otherwise)
        lines.append(f"| `{name}` | {there.project or '-'} | {here} | {remark} |")
    return "\n".join([*lines, ""])


def _title(project: Project) -> str:
    return f"{project.name} {project.version}" if project.version else project.name.capitalize()


def _rows(word: Word) -> Iterator[tuple[str, list[str], str]]:
    """Yield word (with its value), overrides and remark."""
    if word.answer.ways or word.answer.no:
        yield word.name, *_cells(word.answer)
    for index, answer in enumerate(word.values.values()):
        ways, remark = _cells(answer)
        repeated = index > 0 and answer.remark == word.answer.remark
        yield answer.called, ways, answer.no and remark if repeated else remark


def _cells(answer: Answer) -> tuple[list[str], str]:
    no = f"no counterpart: {answer.no}" if answer.no else ""
    return [way.replace(VALUE, COMPUTED) for way in answer.ways], no or answer.remark
