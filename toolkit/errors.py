"""Errors that a user of the toolkit can cause, and "did you mean" hints for misspelled names.

Every message says which value is wrong, where, what is allowed there and what to do next. Each class is also the
built-in error that it refines, so ``except ValueError`` keeps working.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any


class ToolkitError(Exception):
    """Base of every error that the toolkit raises on purpose."""

    report: tuple[Any, ...] | None = None
    """What `toolkit.schema` made the message from; an outer config uses it to give the full path."""
    is_from_elsewhere = False
    """Whether another process raised the error and prints the details."""
    is_reported = False
    """Whether the error was reported to the other processes."""


class ConfigError(ToolkitError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another one."""


class DataError(ToolkitError, ValueError):
    """A batch does not have the fields, shapes or values that the loss needs."""


class LaunchError(ToolkitError, RuntimeError):
    """The processes that run are not the ones that were asked for."""


def nearest(word: str, options: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the option spelled most like `word`, or None when no similarity, 0 to 1, reaches `cutoff`."""
    matches = difflib.get_close_matches(word, list(options), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"``, or an empty string when nothing comes close."""
    best = nearest(word, options)
    return f" (did you mean {best!r}?)" if best else ""


def listed(options: Iterable[object], joiner: str = "or") -> str:
    """Join options for a sentence: ``'a', 'b' or 'c'``; ``none`` without any."""
    words = [repr(option) for option in options]
    if not words:
        return "none"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {joiner} {words[-1]}"


def a_type(value: object) -> str:
    """Return what a `value` is, for a sentence: ``"an int"``, ``"a Tensor"`` or ``"None"``."""
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


_warned: set[str] = set()


def warn_once(message: str | None) -> None:
    """Warn, once per process, of a setting that works differently than its name says; None: do nothing."""
    if message is not None and message not in _warned:
        _warned.add(message)
        warnings.warn(message, UserWarning, stacklevel=_level_of_caller() - 1)


def _level_of_caller() -> int:
    """Return the ``stacklevel`` (of a warning raised here) of the first frame outside this package and pydantic."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("toolkit", "pydantic"):
        frame, level = frame.f_back, level + 1
    return level


def say_warnings_plainly() -> None:
    """Print each warning of `warn_once` as one line, as a command line should; other warnings do not change.

    Of the processes that a launcher started with the same settings, the first one prints it.
    """
    usual = warnings.formatwarning
    is_first = os.environ.get("RANK", "") in ("", "0", "-1")

    def formatted(message: Warning | str, *args: Any, **kwargs: Any) -> str:
        if str(message) in _warned:
            return f"note: {message}\n" if is_first else ""
        return usual(message, *args, **kwargs)

    warnings.formatwarning = formatted


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, the name of its class where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def described(error: BaseException) -> str:
    """Return the class of an error, and the first line of its message where it has one."""
    name = type(error).__name__
    return name if first_line(error) == name else f"{name}: {first_line(error)}"


@contextlib.contextmanager
def stopping_on_error() -> Iterator[None]:
    """End the program where a `ToolkitError` is raised inside: one line, and exit code 1."""
    try:
        yield
    except ToolkitError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


def print_text(text: str) -> None:
    """Print; the reader may close the pipe early, as ``head`` does."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains when it exits


def has_warned(message: str) -> bool:
    """Whether `warn_once` already gave this warning."""
    return message in _warned
