"""Checks over several processes: a step gives one gradient, however processes, micro-batches and shards divide it."""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from toolkit.check.loss_checks import config
from toolkit.check.outcome import Outcome
from toolkit.check.subject import load_subject
from toolkit.errors import ConfigError, ToolkitError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.testing import Finding, differences, random_batch
from toolkit.testing.evaluation import Meshes
from toolkit.testing.layout import Layout, layouts_of
from toolkit.testing.processes import run_processes
from toolkit.testing.verdict import verdict

REPRESENTATIVE = ("vanilla", "gspo", "fipo", "real", "clip_cov")
"""One policy loss of each scope, and one that looks ahead; run with cross-entropy and OREAL."""
MICRO_BATCHES = (1, 2, 4)
MODES = ("eager", "chunk")
RTOL = 1e-12


def run_spread(processes: int, what: str | None = None, options: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Run the checks in new processes joined by gloo; a broken loss gives failed outcomes, never an exception.

    Args:
        processes: at least 2.
        what: see `load_subject`; None: a set of losses that covers every scope, one outcome each.
        options: of that loss.
    """
    started = time.perf_counter()
    name = f"{processes} processes"
    broken = _breaks_alone(what, dict(options or {}))
    if broken is not None:
        return [Outcome(name, "failed", broken, time.perf_counter() - started)]
    try:
        outcomes: list[Outcome] = run_processes(processes, _checked, what, dict(options or {}))
    except ToolkitError as error:
        return [Outcome(name, "failed", str(error), time.perf_counter() - started)]
    return outcomes


def _breaks_alone(what: str | None, options: dict[str, Any]) -> str | None:
    """Return why a loss cannot be computed in one process, before others are started; None: it can."""
    if what is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            cfg = config(load_subject(what, options))
            differences(cfg, random_batch(cfg), [Layout()], rtol=RTOL)
        except ToolkitError as error:
            return str(error)
        except Exception as error:  # the user's function may raise anything
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return f"it raised {type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
    return None


def _checked(what: str | None, options: dict[str, Any]) -> list[Outcome]:
    """Return the outcomes; every process calls this, and if one raises, all end."""
    meshes = Meshes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if what is not None:
            cfg = config(load_subject(what, options))
            return [_outcome(name, cfg, layouts, meshes) for name, layouts in _checks().items()]
        configs: dict[str, BaseLossConfig] = {"cross-entropy": CELossConfig(), "oreal": OrealLossConfig()}
        configs |= {f"policy loss {name}": config(load_subject(name)) for name in REPRESENTATIVE}
        every = [layout for layouts in _checks().values() for layout in layouts]
        return [_outcome(name, cfg, every, meshes) for name, cfg in configs.items()]


def _checks() -> dict[str, list[Layout]]:
    """Return the layouts of each check for the current number of processes."""
    from toolkit.distributed import world_size

    number = world_size()
    shards = [count for count in range(2, number + 1) if number % count == 0]
    return {
        "processes and micro-batches do not matter": layouts_of(number, MICRO_BATCHES, (1,), (False,), MODES),
        "packed rows over processes": layouts_of(number, MICRO_BATCHES, (1,), (True,), MODES),
        "sequence parallelism does not matter": layouts_of(number, (1, 2), shards, (False, True), MODES),
    }


def _outcome(name: str, cfg: BaseLossConfig, layouts: list[Layout], meshes: Meshes) -> Outcome:
    started = time.perf_counter()
    try:
        findings: list[Finding] = differences(cfg, random_batch(cfg), layouts, rtol=RTOL, meshes=meshes)
    except ConfigError as error:  # raised by all processes, before they wait for each other
        return Outcome(name, "failed", str(error), time.perf_counter() - started)
    status: Literal["ok", "failed"] = "failed" if findings else "ok"
    words = verdict(type(cfg).__name__, findings, layouts) if findings else ""
    return Outcome(name, status, words.replace("\n", "\n      "), time.perf_counter() - started)
