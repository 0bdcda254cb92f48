"""What other projects call an option, and what to write here instead: ``epsilon`` is ``policy_loss.cliprange_low``.

The words are in ``words.toml``, one table for each project. Messages about an unknown setting read it, as do
``python -m toolkit.explain --from <project>`` and ``tutorials/reference/words.md``. The file is opened on the first
question; a configuration without a mistake asks none.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit.errors import ConfigError, did_you_mean, listed
from toolkit.peers.python_form import COMPUTED, LOSS_GROUPS, VALUE, as_options, in_python, literal, pairs_of

FILE = Path(__file__).with_name("words.toml")
LEFT_OUT = "it is about generation servers, data loading or logs, which the training command does not have"
MAX_SHOWN = 80
"""Characters of a value that is repeated in a message; quotes and spaces are not."""
CLIPPING = ("vanilla", "ppo", "grpo")
"""Names that projects give to one loss, PPO's clipped ratio."""
OTHER_GROUPS = ("policy_loss", "loss", "advantage", "aggregation", "kl", "correction")
"""Where a name that stands in the wrong group may belong."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one word, or one value of it, is here."""

    ways: tuple[str, ...] = ()
    """Overrides, several of them separated by spaces; each entry is enough by itself."""
    no: str = ""
    """Why there is no counterpart, or what else to do."""
    called: str = ""
    """The word, with the value if the answer depends on it."""
    projects: tuple[str, ...] = ()
    """Names of the projects that mean this by the word."""
    remark: str = ""
    """What differs."""


@dataclass(frozen=True, kw_only=True)
class Word:
    """An option of another project."""

    name: str
    """With dots if it is nested there."""
    answer: Answer
    """For any value; empty if all depends on the value."""
    values: Mapping[str, Answer]
    """For single values."""
    names: str = ""
    """The group of choices that its values name, such as ``kl``."""
    example: str = "1"
    """A value that the overrides accept."""
    is_nested: bool = False
    """Whether its last part alone is too common to stand for it, as the ``name`` of ``model.name``."""

    def answer_to(self, value: str | None) -> Answer | None:
        """Return what the word is here if it has this value; None if nothing is known of the value."""
        by_value = {key.lower(): answer for key, answer in self.values.items()}
        if value is not None and value.lower() in by_value:
            return by_value[value.lower()]
        return self.answer if self.answer.ways or self.answer.no else None


@dataclass(frozen=True, kw_only=True)
class Project:
    """The words of one project."""

    name: str
    version: str
    read: str
    """The files or classes that have the words."""
    words: tuple[Word, ...]
    left_out: tuple[str, ...] = ()
    """Its options that concern neither the loss nor the run."""


@functools.cache
def projects() -> dict[str, Project]:
    """Return every project by the name that ``--from`` takes."""
    tables = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return {key: _project(table) for key, table in tables.items()}


def _project(table: Mapping[str, Any]) -> Project:
    words = tuple(_word(name, entry, table["name"]) for name, entry in table["words"].items())
    return Project(
        name=table["name"],
        version=table["version"],
        read=table["read"],
        words=words,
        left_out=tuple(table.get("left_out", ())),
    )


def _word(name: str, entry: Mapping[str, Any], project: str) -> Word:
    answer = Answer(
        ways=tuple(entry.get("ours", ())),
        no=entry.get("no", ""),
        called=name,
        projects=(project,),
        remark=entry.get("remark", ""),
    )
    values = {}
    for value, ours in entry.get("values", {}).items():
        special = ours if isinstance(ours, Mapping) else {"ours": ours}
        ways = special.get("ours", [])
        values[value] = replace(
            answer,
            called=f"{name}={value}",
            ways=(ways,) if isinstance(ways, str) else tuple(ways),
            no=special.get("no", ""),
            remark=special.get("remark", answer.remark),
        )
    example = str(entry.get("example", 1))
    names, is_nested = entry.get("names", ""), entry.get("nested", False)
    return Word(name=name, answer=answer, values=values, names=names, example=example, is_nested=is_nested)


def words_of(project: str) -> Project:
    """Return the words of a project.

    Args:
        project: as ``--from`` takes it, such as ``trl``; upper case and hyphens do not matter.

    Raises:
        ConfigError: there is no such project; the message lists the known ones.
    """
    known = projects()
    key = project.lower().replace("-", "_")
    if key not in known:
        raise ConfigError(
            f"--from {project}: no such project; choose {listed([*known, 'all'])}{did_you_mean(key, known)}"
        )
    return known[key]


# -------------------------------------------------------------------- messages


def counterpart(word: str, value: str | None = None, known: Collection[str] = ()) -> str | None:
    """Say what to write instead of a word of another project; None if no project has it.

    Args:
        word: a setting that does not exist, with dots or without.
        value: what it was set to.
        known: the settings that exist; overrides that set others are left out. Empty: leave out none.
    """
    return _sentence(_accepted(answer, known) for answer in _answers(word, value))


def counterpart_choice(group: str, choice: str, groups: Mapping[str, Collection[str]]) -> str | None:
    """Say what to write for a choice that a group does not have; None if no project has a name like this.

    Args:
        group: such as ``policy_loss``.
        choice: the name.
        groups: every group with its choices.
    """
    if choice.startswith("preset/"):
        peer, _, name = choice.rpartition("/")
        same = [each for each in CLIPPING if name in CLIPPING and f"{peer}/{each}" in groups[group]]
        return f"try: {group}={peer}/{same[0]}" if same else None
    if group == "model" and ("/" in choice or choice.startswith((".", "~")) or Path(choice, "config.json").is_file()):
        return f"try: model=pretrained model.path={choice}"
    answers = _answers_to_choice(group, choice)
    if not answers and group in OTHER_GROUPS and choice != "none":
        ways = tuple(
            f"{other}={choice}" for other in OTHER_GROUPS if other != group and choice in groups.get(other, ())
        )
        answers = [Answer(ways=ways)]
    return _sentence(answers)


def counterpart_keyword(word: str, value: object, fields: Collection[str], *, is_option: bool = False) -> str | None:
    """Say what to write in Python instead of a keyword argument that a config class does not have.

    Args:
        word: the keyword.
        value: its value.
        fields: the fields that the class has.
        is_option: whether these are the options of a policy loss.
    """
    if word == "kl" and "kl_loss_type" in fields and isinstance(value, str):  # the group of the command line
        return f"try: {in_python(f'kl={value}')}"
    answers = _answers(word, _text(value))
    if is_option:
        known = [f"policy_loss.{field}" for field in fields]
    elif "ignore_idx" in fields:  # a loss
        known = [f"loss.{field}" for field in fields]
        known += [] if "policy_loss_cfg" in fields else ["policy_loss.loss_type"]
    else:
        of_class = (_accepted_fields(answer, fields) for answer in answers)
        return _sentence(of_class)
    accepted = (_accepted(answer, known) for answer in answers)
    write = as_options if is_option else in_python
    return _sentence(replace(answer, ways=tuple(map(write, answer.ways))) for answer in accepted)


def counterpart_value(group: str, value: object) -> str | None:
    """Say what to write in Python instead of the name of a loss, a KL or an aggregation; None if no project has it."""
    answers = _answers_to_choice(group, _text(value) or "")
    return _sentence(replace(answer, ways=tuple(map(in_python, answer.ways))) for answer in answers)


def _answers(word: str, value: str | None) -> list[Answer]:
    """Return what every project means by a word, with the value put in."""
    answers: list[tuple[Answer, bool, bool]] = []
    is_exact = False
    same_name: list[Word] = []
    leaf = word.rpartition(".")[2]
    for key, project in projects().items():
        matches = [each for each in project.words if each.name.rpartition(".")[2] == leaf]
        same_name += matches
        nested = [each for each in matches if f".{word}".endswith(f".{each.name}") or each.name.endswith(f".{word}")]
        matches = [each for each in matches if not each.is_nested or f".{word}".endswith(f".{each.name}")]
        nested = [each for each in nested if each in matches]
        if leaf in project.left_out:
            answers.append((Answer(no=LEFT_OUT, called=leaf, projects=(project.name,)), False, word == leaf))
        for each in nested if word != leaf and nested else matches:
            answer = each.answer_to(value)
            is_exact |= value is not None and answer is not None and answer is not each.answer
            unclear = replace(each.answer, no=f"it depends on its value: python -m toolkit.explain --from {key}")
            is_nested = word == leaf or each in nested
            answers.append((answer or unclear, answer is not None and answer is not each.answer, is_nested))
    if not is_exact and value is not None and answers:
        named = next((each.names for each in same_name if each.names), "")
        by_name = _answers_to_choice(named, value) if named else []
        if by_name:  # the value is a name that another project gives to such a choice
            return by_name
    if is_exact:  # a project that has this value means it
        answers = [each for each in answers if each[1]]
    if any(is_nested for *_, is_nested in answers):
        answers = [each for each in answers if each[2]]
    return [_filled(answer, value) for answer, *_ in answers]


def _answers_to_choice(group: str, choice: str) -> list[Answer]:
    """Return what every project means by a name; after the first one only its preset, if it has one."""
    names = "loss" if group in LOSS_GROUPS else group
    answers: list[Answer] = []
    for project in projects().values():
        for word in project.words:
            answer = word.answer_to(choice) if word.names == names else None
            if answer is not None and answer is not word.answer:
                presets = tuple(way for way in answer.ways if way.startswith("loss=preset/"))
                ways = presets or answer.ways[:1] if answers and answer.ways else answer.ways
                answers.append(replace(answer, called=choice, ways=ways))
    return answers


def _filled(answer: Answer, value: str | None) -> Answer:
    is_plain = value is not None and len(value) <= MAX_SHOWN and not {*value} & {*" '\"\\\n"}
    shown = value if value is not None and is_plain else COMPUTED
    return replace(answer, ways=tuple(way.replace(VALUE, shown) for way in answer.ways))


def _accepted(answer: Answer, known: Collection[str]) -> Answer:
    """Return an answer without the ways that set what does not exist; presets have options of a policy loss inside."""
    ways = []
    sections = {key.partition(".")[0] for key in known}
    is_preset = any(key.startswith("loss.policy_loss_cfg.") for key in known)
    for way in answer.ways:
        chosen = {key for key, _ in pairs_of(way) if "." not in key}
        if is_preset and "policy_loss" in chosen:
            continue  # a preset defines its policy loss
        tokens = []
        for token in way.split(" "):
            key = token.partition("=")[0]
            section, _, option = key.partition(".")
            inside = f"loss.policy_loss_cfg.{option}"
            if section == "policy_loss" and inside in known:
                token = token.replace(key, inside, 1)
            elif option and key not in known and section in sections and not {section, "kl", "aggregation"} & chosen:
                break
            tokens.append(token)
        else:
            ways.append(" ".join(tokens))
    return replace(answer, ways=tuple(ways))


def _accepted_fields(answer: Answer, fields: Collection[str]) -> Answer:
    """Return an answer with the ways that set fields of a class, without the section that they have in a run."""
    ways = []
    for way in answer.ways:
        pairs = [(key.rpartition(".")[2], value) for key, value in pairs_of(way)]
        if all(key in fields for key, _ in pairs):
            ways.append(", ".join(f"{key}={literal(value)}" for key, value in pairs))
    return replace(answer, ways=tuple(ways))


def _sentence(answers: Iterable[Answer]) -> str | None:
    """Join answers to a clause; those that say the same are named together."""
    merged: dict[tuple[tuple[str, ...], str], Answer] = {}
    for answer in answers:
        same = merged.get((answer.ways, answer.no))
        if same is not None:
            both = dict.fromkeys((*same.projects, *answer.projects))
            answer = replace(same, projects=tuple(both), remark=same.remark or answer.remark)
        if answer.ways or answer.no:
            merged[answer.ways, answer.no] = answer
    tries = [f"{', or '.join(each.ways)}{_source(each)}" for each in merged.values() if each.ways]
    lacking = [
        f"{each.called} of {_named(each.projects)} has no counterpart: {each.no}"
        for each in merged.values()
        if not each.ways
    ]
    return "; ".join([*(["try: " + "; or ".join(tries)] if tries else []), *lacking]) or None


def _source(answer: Answer) -> str:
    if not answer.projects:
        return ""
    remark = f"; {answer.remark}" if answer.remark else ""
    return f" ({answer.called.partition('=')[0]} of {_named(answer.projects)}{remark})"


def _named(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# -------------------------------------------------------------------- the same in Python


def _text(value: object) -> str | None:
    """Return a value as an override has it; None for one that an override cannot have."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(str, value))}]"
    return str(value) if isinstance(value, (str, int, float, bool, type(None))) else None
