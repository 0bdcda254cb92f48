"""Errors that a user of the toolkit can cause, and the words for "did you mean".

Every message says what was given, where, what is allowed there and what to do next. Each class is also the
builtin error it refines, so that ``except ValueError`` keeps working.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ToolkitError(Exception):
    """Base of every error that the toolkit raises on purpose."""


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
