"""A full disk or a folder that cannot be written, in one line that says what is missing and what is left. No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

from toolkit.errors import ToolkitError
from toolkit.training.disk import free_in
from toolkit.training.resume_command import how_to_continue
from toolkit.training.saved import described, newest

REMEDIES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "make the folder writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EIO: "see to the disk",
}
"""Errors of a disk -> what to do."""


@contextlib.contextmanager
def in_one_line(output_dir: Path) -> Iterator[None]:
    """Turn an error of the disk below `output_dir` into one line that says what is missing and what is left.

    Raises:
        ToolkitError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except Exception as error:
        number = _number_of(error)
        name = getattr(error, "filename", None)
        is_elsewhere = name is not None and output_dir.resolve() not in Path(os.fsdecode(name)).resolve().parents
        if number not in REMEDIES or is_elsewhere:
            raise
        where = Path(os.fsdecode(name)) if name is not None else output_dir
        raise ToolkitError(
            f"{where} cannot be written: {os.strerror(number)} ({free_in(output_dir)} free); "
            f"{_what_is_left(output_dir)}; {REMEDIES[number]}, then continue: {how_to_continue(output_dir)}"
        ) from None


def _number_of(error: BaseException) -> int:
    """Return the number that the system gave an error, 0 if none; safetensors has it in its text."""
    if isinstance(error, OSError):
        return error.errno or 0
    match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match[1]) if match else 0


def _what_is_left(output_dir: Path) -> str:
    folder, _ = newest(output_dir)
    if folder is None:
        return "no checkpoint was written before"
    return f"the last whole checkpoint is {folder} ({described(folder)})"
