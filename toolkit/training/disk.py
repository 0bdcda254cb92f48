"""Writing that survives a crash: whole files by rename, files and folders flushed to the disk. No torch here.

A rename is atomic, but what it names may still be in memory when the power goes, so it is flushed before.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    if os.name == "nt":  # it flushes no folders
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot flush a folder
            raise
    finally:
        os.close(number)


def flush_tree(folder: Path) -> None:
    """Wait until the disk has all files below `folder`, and their names."""
    for path in sorted(folder.rglob("*")):
        flush(path)
    flush(folder)


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is either the earlier one or complete, whenever the process dies."""
    fresh = path.with_name(f"{path.name}.writing")
    try:
        with fresh.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    fresh.replace(path)


def replace_folder(fresh: Path, final: Path) -> None:
    """Rename `fresh` to `final`, which may exist; a crash in between leaves the older one as ``<final>.old``."""
    old = final.with_name(f"{final.name}.old")
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(final, old)
    os.replace(fresh, final)
    flush(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def free_in(folder: Path) -> str:
    """Return how much can be written to a folder, with its unit."""
    try:
        return shown_size(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown number of bytes"


def shown_size(num_bytes: float) -> str:
    """Return a number of bytes for a sentence, e.g. ``12.5 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
