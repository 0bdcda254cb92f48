"""The command that continues a run: its overrides, kept beside its files, and its checkpoint. No torch here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from omegaconf import OmegaConf

HYDRA = ".hydra"
"""Folder in which Hydra keeps the overrides of a run; `toolkit.train.train` writes none."""
PLAIN = re.compile(r"[\w./-]+")
"""A path that an override may hold without quotes."""
NOT_AGAIN = ("training.resume", "training.overwrite")
"""Settings of a run that its continuation does not repeat."""


def overrides_of(run_dir: Path) -> list[str] | None:
    """Return the overrides of a run, those of its folders of configuration included; None: it has not kept them."""
    folder = run_dir / HYDRA
    if not (folder / "overrides.yaml").is_file() or not (folder / "hydra.yaml").is_file():
        return None
    of_run = [str(override) for override in OmegaConf.load(folder / "overrides.yaml")]
    of_hydra = OmegaConf.select(OmegaConf.load(folder / "hydra.yaml"), "hydra.overrides.hydra") or []
    searched = [str(override) for override in of_hydra if str(override).lstrip("+").startswith("hydra.searchpath=")]
    return [override for override in of_run if override.lstrip("+").partition("=")[0] not in NOT_AGAIN] + searched


def command_to_continue(run_dir: Path) -> str | None:
    """Return the command that continues the run in `run_dir`, ready for a shell; None: its overrides are not known."""
    overrides = overrides_of(run_dir)
    if overrides is None:
        return None
    path = str(run_dir)
    if not PLAIN.fullmatch(path):
        path = "'" + path.replace("'", "\\'") + "'"
    return shlex.join(["toolkit-train", *overrides, f"training.resume={path}"])


def how_to_continue(run_dir: Path) -> str:
    """Return the same command, or without one what to add to that of the run."""
    return command_to_continue(run_dir) or f"the same overrides and training.resume={run_dir}"
