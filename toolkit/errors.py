"""Errors that a user of the toolkit can cause, and the words for "did you mean".

Every message says what was given, where, what is allowed there and what to do next. Each class is also the
builtin error it refines, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any


class ToolkitError(Exception):
    """Base of every error that the toolkit raises on purpose."""

    report: tuple[Any, ...] | None = None
    """What `toolkit.schema` made the message of, for the config around to name the whole path."""
    is_from_elsewhere = False
    """Whether another process found the mistake, and says more of it."""
    is_told = False
    """Whether the other processes have been told."""


class ConfigError(ToolkitError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another one."""


class DataError(ToolkitError, ValueError):
    """A batch does not have the fields, shapes or values that the loss needs."""


class LaunchError(ToolkitError, RuntimeError):
    """The processes that run are not the ones that were asked for."""


def nearest(word: str, options: Iterable[str]) -> str | None:
    """Return the option spelt most like `word`, or None when nothing comes close."""
    found = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return found[0] if found else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"``, or an empty string when nothing comes close."""
    found = nearest(word, options)
    return f" (did you mean {found!r}?)" if found else ""


def listed(options: Iterable[object], joiner: str = "or") -> str:
    """Join options for a sentence: ``'a', 'b' or 'c'``."""
    words = [repr(option) for option in options]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joiner} {words[-1]}"


_warned: set[str] = set()


def warn_once(message: str | None) -> None:
    """Warn of a choice that works but does something else than its name says, once in a process; None: nothing."""
    if message is not None and message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=_level_of_caller() - 1)


def _level_of_caller() -> int:
    """Return the ``stacklevel`` (of a warning given here) of the first frame outside of this package and pydantic."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("toolkit", "pydantic"):
        frame, level = frame.f_back, level + 1
    return level


def say_warnings_plainly() -> None:
    """Print what `warn_once` says as one line, as a command line should; other warnings stay as they are."""
    usual = warnings.formatwarning

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"note: {message}\n" if str(message) in _warned else usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted


def print_text(text: str) -> None:
    """Print; whoever reads may stop early, as ``head`` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits


def has_warned(message: str) -> bool:
    """Whether `warn_once` said this already."""
    return message in _warned
