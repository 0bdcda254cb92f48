"""The checkpoints in a folder: which are complete, which one a run continues from, which are kept. No torch here.

A checkpoint is written to ``checkpoint.writing``; its last file, the manifest, lists the others with their sizes. Then
it is renamed to ``checkpoint``. The one before keeps its files until then, as ``checkpoint-<phase>-<step>`` if
``training.keep_last`` asks for it, otherwise as ``checkpoint.old``, which is removed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from toolkit.training.disk import flush

CHECKPOINT = "checkpoint"
"""Folder of the checkpoint in an output directory."""
WRITING, OLD, BEST = f"{CHECKPOINT}.writing", f"{CHECKPOINT}.old", f"{CHECKPOINT}-best"
MANIFEST = "manifest.json"
STATE = "state.json"
PHASES = ("warmup", "main")
"""In their order."""
_NUMBERED = re.compile(rf"{CHECKPOINT}-({'|'.join(PHASES)})-(\d+)")


def write_manifest(folder: Path, phase: str, next_step: int, **facts: Any) -> None:
    """Write the manifest, which makes the files that are in `folder` now a complete checkpoint."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    manifest = {"phase": phase, "next_step": next_step, **facts, "files": sizes}
    with (folder / MANIFEST).open("w") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return what `write_manifest` wrote; None: there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):  # of JSON or of the encoding
        return None
    is_one = isinstance(manifest, dict) and manifest.get("phase") in PHASES and isinstance(manifest.get("files"), dict)
    return manifest if is_one and isinstance(manifest.get("next_step"), int) else None


def damage(folder: Path) -> str | None:
    """Return what a checkpoint lacks, with the name of the file; None: it is complete."""
    manifest = read_manifest(folder)
    if manifest is None:
        is_there = (folder / MANIFEST).is_file()
        why = "cannot be read" if is_there else "is missing (an earlier version, or a write that did not end)"
        return f"{folder / MANIFEST} {why}"
    for name, size in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size:,} of {size:,} bytes"
    return None


def position(folder: Path) -> tuple[int, int]:
    """Return the phase and the step of a checkpoint with a manifest, in an order that grows with training."""
    manifest = read_manifest(folder)
    return (PHASES.index(manifest["phase"]), manifest["next_step"]) if manifest is not None else (-1, -1)


def described(folder: Path) -> str:
    """Return the phase and the step of a checkpoint for a sentence, e.g. ``main step 3``."""
    phase, step = position(folder)
    return f"{PHASES[phase]} step {step}"


def num_bytes(folder: Path) -> int:
    """Return the size of a checkpoint with a manifest."""
    manifest = read_manifest(folder)
    return sum(manifest["files"].values()) if manifest is not None else 0


def numbered(output_dir: Path) -> list[Path]:
    """Return the older checkpoints that are kept, the newest first."""
    matches = [(_NUMBERED.fullmatch(path.name), path) for path in output_dir.glob(f"{CHECKPOINT}-*")]
    steps = [((PHASES.index(match[1]), int(match[2])), path) for match, path in matches if match is not None]
    return [path for _, path in sorted(steps, reverse=True)]


def all_in(output_dir: Path) -> list[Path]:
    """Return the folders of checkpoints of a run, complete or not, the one to continue from first.

    One that is complete but has not been renamed is the newest: it was written after the others.
    """
    folders = [output_dir / CHECKPOINT, output_dir / OLD, *numbered(output_dir), output_dir / BEST]
    writing = output_dir / WRITING
    return [folder for folder in ([writing] if damage(writing) is None else []) + folders if folder.is_dir()]


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the complete checkpoint that continues the run in `run_dir`, and what newer ones lack.

    `run_dir` may also be such a folder itself, or one with the files of a checkpoint at its top.
    """
    is_one = (run_dir / MANIFEST).is_file() or (run_dir / STATE).is_file()
    lacking: list[str] = []
    for folder in [*all_in(run_dir), *([run_dir] if is_one else [])]:
        reason = damage(folder)
        if reason is None:
            return folder, lacking
        if folder.name != OLD and ((folder / MANIFEST).exists() or folder.name == CHECKPOINT or folder == run_dir):
            lacking.append(reason)  # the others are being removed
    return None, lacking


def make_current(output_dir: Path, keep_last: int) -> None:
    """Make the checkpoint that has just been written the current one, and remove all but `keep_last`.

    Nothing is removed before. Those of later steps go too: the run has been continued from before them.
    """
    fresh, final, old = (output_dir / name for name in (WRITING, CHECKPOINT, OLD))
    here = position(fresh)
    if final.exists():
        phase, step = position(final)
        is_kept = keep_last > 1 and (phase, step) < here and damage(final) is None
        target = output_dir / f"{CHECKPOINT}-{PHASES[phase]}-{step}" if is_kept else old
        remove(target)
        os.replace(final, target)
    os.replace(fresh, final)
    flush(output_dir)
    remove(old)
    earlier = [folder for folder in numbered(output_dir) if position(folder) < here]
    for folder in numbered(output_dir):
        if folder not in earlier[: keep_last - 1]:
            remove(folder)


def remove(folder: Path) -> None:
    """Remove a folder; its manifest first, so what a crash leaves does not count as a checkpoint."""
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
