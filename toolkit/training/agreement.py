"""The first exchange of a run: every process must have the settings of the others, or their replicas drift apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from toolkit.distributed import all_gather_objects, rank
from toolkit.errors import LaunchError

MAY_DIFFER = ("model.cpu_threads",)
"""Settings of a machine, which change no result."""
MOST_NAMED = 8
"""Settings in a message."""


def agree(output_dir: str, cfg: DictConfig) -> str:
    """Return the output directory of rank 0; all processes call it together, each with its composed configuration.

    A digest of 32 bytes is sent; the settings themselves only if digests differ.

    Raises:
        LaunchError: another process has other settings; names each with both values, on every rank that it concerns.
    """
    settings = flat(cfg)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).digest()
    output_dirs, digests = zip(*all_gather_objects((output_dir, digest)), strict=True)
    if len(set(digests)) > 1:
        here = rank()
        everyone = all_gather_objects(settings)
        other = next(index for index, each in enumerate(digests) if each != digest)
        raise LaunchError(
            "the processes of one run have different settings: "
            f"{_differences(settings, everyone[other], here, other)}; start all with the same overrides and files"
        )
    return str(output_dirs[0])


def flat(cfg: DictConfig) -> dict[str, Any]:
    """Return the resolved settings by dotted key, without those that follow another key and those that may differ."""
    resolved = dict(_flat(OmegaConf.to_container(cfg, resolve=True)))
    written = dict(_flat(OmegaConf.to_container(cfg, resolve=False)))
    follows = [key for key, value in written.items() if str(value).startswith("${") and ":" not in str(value)]
    return {
        key: value
        for key, value in resolved.items()
        if key not in MAY_DIFFER and not any(f"{key}.".startswith(f"{other}.") for other in follows)
    }


def _flat(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(node, Mapping):
        yield prefix.removesuffix("."), node
        return
    for key, value in node.items():
        yield from _flat(value, f"{prefix}{key}.")


def _differences(ours: dict[str, Any], theirs: dict[str, Any], here: int, other: int) -> str:
    """Return the settings that differ, with the value of both ranks."""
    keys = [key for key in {**ours, **theirs} if _shown(ours, key) != _shown(theirs, key)]
    named = [f"{key}={_shown(ours, key)} on rank {here}, {_shown(theirs, key)} on rank {other}" for key in keys]
    more = [f"and {len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
    return "; ".join([*named[:MOST_NAMED], *more])


def _shown(settings: dict[str, Any], key: str) -> str:
    return repr(settings[key]) if key in settings else "(not there)"
