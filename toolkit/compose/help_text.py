"""What ``--help`` prints: every choice, and every setting with its value and what it means; no torch here.

Hydra's help shows values without their meaning, and takes several times as long.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence

from omegaconf import DictConfig

from toolkit.compose.diagnosis import choices_shown
from toolkit.compose.settings import Setting, as_written, settings_in
from toolkit.compose.tree import Root, groups_of

MOST_COLUMNS, FEWEST_COLUMNS = 120, 80
SETTING_COLUMNS = 42
"""Columns for ``key=value``; if that is longer, its meaning is on the next line."""


def help_text(
    cfg: DictConfig, *, root: Root, purpose: str, examples: Mapping[str, str], folders: Sequence[str] = ()
) -> str:
    """Return the help of a command: its `purpose`, choices, the settings of `cfg`, and `examples` with their meaning.

    `folders` are additional configuration folders.
    """
    width = min(max(shutil.get_terminal_size((MOST_COLUMNS, 24)).columns, FEWEST_COLUMNS), MOST_COLUMNS)
    choices = [
        textwrap.fill(f"{group}: {', '.join(choices_shown(names))}", width, subsequent_indent="  ")
        for group, names in groups_of(root, *folders).items()
    ]
    return "\n".join(
        [
            textwrap.fill(purpose, width),
            "",
            "== Choices: group=choice ==",
            *choices,
            "",
            "== Settings: key=value, with the values of the choices made ==",
            *_settings(cfg, width),
            "",
            "== Examples ==",
            *(f"  {command}" + (f"  # {meaning}" if meaning else "") for command, meaning in examples.items()),
        ]
    )


def _settings(cfg: DictConfig, width: int) -> Iterator[str]:
    part = ""
    for setting in settings_in(cfg):
        if setting.key.partition(".")[0] != part and "." in setting.key:
            part = setting.key.partition(".")[0]
            yield ""
        yield from _lines(setting, width)


def _lines(setting: Setting, width: int) -> Iterator[str]:
    start = f"{setting.key}={as_written(setting.value)}"
    meaning = _as_help(setting.meaning or "")
    indent = " " * (SETTING_COLUMNS + 2)
    if len(start) > SETTING_COLUMNS or not meaning:
        yield start
        start = ""
    if meaning:
        first, *rest = textwrap.wrap(meaning, width - len(indent), break_on_hyphens=False)
        yield f"{start:<{SETTING_COLUMNS}}  {first}"
        yield from (indent + line for line in rest)


def _as_help(text: str) -> str:
    """Return a docstring in command-line spelling, where None is ``null``."""
    plain = " ".join(text.split()).rstrip(".").replace("``", "`")
    for python, yaml in (("None", "null"), ("True", "true"), ("False", "false")):
        plain = re.sub(rf"\b{python}\b", yaml, plain)
    return plain
