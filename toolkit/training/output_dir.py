"""The output directory of a run: created, locked and checked before torch is loaded, so no run replaces another.

The lock is advisory (``flock``): the system releases it when the process ends, however it ends.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from toolkit.errors import ConfigError
from toolkit.training.config import TrainingConfig
from toolkit.training.saved import CHECKPOINT, newest, num_bytes
from toolkit.training.startup import check_room

try:
    import fcntl
except ImportError:  # Windows, which has other locks
    fcntl = None  # type: ignore[assignment]

MODEL = "model"
"""Folder of the exported model in an output directory."""
LOCK = ".lock"
FILES = (
    *(CHECKPOINT, f"{CHECKPOINT}.old", f"{CHECKPOINT}.writing", f"{CHECKPOINT}-*"),
    *(MODEL, f"{MODEL}.old", f"{MODEL}.writing"),
    *("metrics.jsonl", "samples.jsonl", "summary.json", "curves.png", "config.yaml"),
)
"""What a run writes, as patterns; a folder that holds one of them holds a run."""
LEAST = 1 << 20
"""Bytes that a run needs at least: its log, its settings and the figure."""

_locks: dict[Path, TextIO] = {}
"""Locked directories of this process -> their lock files."""


def new_dir(path: str) -> str:
    """Create a folder that did not exist, and return it: `path`, or `path` with a number if two start in one second.

    Raises:
        ConfigError: it cannot be created.
    """
    candidates = itertools.chain([path], (f"{path}-{number}" for number in itertools.count(2)))
    with _explained(path):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        for candidate in candidates:
            with contextlib.suppress(FileExistsError):
                Path(candidate).mkdir()
                return candidate
    raise AssertionError("there is no last number")


def claim(path: str, config: TrainingConfig) -> None:
    """Create the output directory and lock it until `release` or the end of the process; again: do nothing.

    Raises:
        ConfigError: it cannot be created or written, another process uses it, or it holds a run that is neither
            continued nor replaced.
    """
    folder = Path(path).resolve()
    if folder in _locks:
        return
    check_free(path, config)
    with _explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("a+")
    try:
        _lock(lock, path)
        check_free(path, config)  # another run may have ended a moment ago
        if config.overwrite and not _is_continued(folder, config):
            with _explained(path):
                for file in _files(folder):
                    _remove(file)
        _check_room(folder, config)
        with _explained(path):
            _sign(lock)
    except ConfigError:
        lock.close()
        raise
    _locks[folder] = lock


def release(path: str) -> None:
    """Unlock the directory."""
    lock = _locks.pop(Path(path).resolve(), None)
    if lock is not None:
        lock.close()


def check_free(path: str, config: TrainingConfig) -> None:
    """Raise if the folder holds a run that `config` neither continues nor replaces.

    Raises:
        ConfigError: it does.
    """
    folder = Path(path).resolve()
    earlier = [file.name for file in _files(folder)]
    if earlier and not (config.overwrite or _is_continued(folder, config)):
        raise ConfigError(
            f"hydra.run.dir={path} holds an earlier run ({', '.join(earlier)}); give another folder, continue that run "
            f"with training.resume={path}, or replace it with training.overwrite=true"
        )


def _is_continued(folder: Path, config: TrainingConfig) -> bool:
    """Whether the run resumes from this folder: from its checkpoint, or from one that was copied to its top."""
    return config.resume is not None and folder in (Path(config.resume).resolve(), Path(config.resume).resolve().parent)


def _lock(lock: TextIO, path: str) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ConfigError(
            f"hydra.run.dir={path} is in use by {lock.read().strip() or 'another process'}; give another folder, or "
            "wait until that run has ended"
        ) from None
    except OSError:  # a file system without locks
        return


def _sign(lock: TextIO) -> None:
    """Write who holds the lock, for the message of another process."""
    lock.truncate(0)
    lock.write(f"process {os.getpid()} of {socket.gethostname()}\n")
    lock.flush()


def _check_room(folder: Path, config: TrainingConfig) -> None:
    """Raise if the disk is full, or cannot take another checkpoint like the one to continue from."""
    earlier = newest(Path(config.resume))[0] if config.resume is not None else None
    size = 0 if earlier is None else num_bytes(earlier)
    check_room(folder, max(size, LEAST), "a run" if size < LEAST else "the next checkpoint")


def _files(folder: Path) -> list[Path]:
    """Return what a run has written to a folder, in the order of `FILES`."""
    return [file for pattern in FILES for file in sorted(folder.glob(pattern))]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"hydra.run.dir={path} cannot be created or written: {error.strerror}") from None
