"""Checks over several processes: a step gives one gradient, however processes, micro-batches and shards divide it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from toolkit.check.loss_checks import config
from toolkit.check.outcome import Outcome
from toolkit.check.subject import load_subject
from toolkit.compose.plugins import why_it_failed
from toolkit.distributed import world_size
from toolkit.errors import ConfigError, ToolkitError
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.testing import Finding, differences, random_batch
from toolkit.testing.layout import Layout, layouts_of
from toolkit.testing.processes import run_processes
from toolkit.testing.verdict import verdict

REPRESENTATIVE = ("vanilla", "gspo", "fipo", "real", "clip_cov")
"""One policy loss of each scope, and one that looks ahead; run with cross-entropy and OREAL."""
MICRO_BATCHES = (1, 2, 4)
MODES = ("eager", "chunk")


def run_spread(processes: int, what: str | None = None, options: Mapping[str, Any] | None = None) -> list[Outcome]:
    """Run the checks in new processes joined by gloo; a broken loss gives failed outcomes, never an exception.

    `what` is as in `load_subject`; None: a set of losses that covers every scope, one outcome each.
    """
    started = time.perf_counter()
    try:
        if what is not None:
            _check_alone(what, dict(options or {}))
        return run_processes(processes, _checked, what, dict(options or {}))
    except ToolkitError as error:
        return [Outcome(f"{processes} processes", "failed", str(error), time.perf_counter() - started)]


def _check_alone(what: str, options: dict[str, Any]) -> None:
    """Raise if a loss cannot be computed in one process, before others are started."""
    with warnings.catch_warnings(action="ignore"):
        try:
            cfg = config(load_subject(what, options))
            differences(cfg, random_batch(cfg), [Layout()])
        except ToolkitError:
            raise
        except Exception as error:  # the user's function may raise anything
            raise ConfigError(f"it raised {why_it_failed(error)}") from None


def _checked(what: str | None, options: dict[str, Any]) -> list[Outcome]:
    """Return the outcomes; every process calls this, and if one raises, all end."""
    with warnings.catch_warnings(action="ignore"):
        if what is not None:
            cfg = config(load_subject(what, options))
            return [_outcome(name, cfg, layouts) for name, layouts in _checks().items()]
        configs: dict[str, BaseLossConfig] = {"cross-entropy": CELossConfig(), "oreal": OrealLossConfig()}
        configs |= {f"policy loss {name}": config(load_subject(name)) for name in REPRESENTATIVE}
        every = [layout for layouts in _checks().values() for layout in layouts]
        return [_outcome(name, cfg, every) for name, cfg in configs.items()]


def _checks() -> dict[str, list[Layout]]:
    """Return the layouts of each check for the current number of processes."""
    number = world_size()
    shards = [count for count in range(2, number + 1) if number % count == 0]
    return {
        "processes and micro-batches do not matter": layouts_of(number, MICRO_BATCHES, (1,), (False,), MODES),
        "packed rows over processes": layouts_of(number, MICRO_BATCHES, (1,), (True,), MODES),
        "sequence parallelism does not matter": layouts_of(number, (1, 2), shards, (False, True), MODES),
    }


def _outcome(name: str, cfg: BaseLossConfig, layouts: list[Layout]) -> Outcome:
    started = time.perf_counter()
    try:
        findings: list[Finding] = differences(cfg, random_batch(cfg), layouts)
    except ConfigError as error:  # raised by all processes, before they wait for each other
        return Outcome(name, "failed", str(error), time.perf_counter() - started)
    status: Literal["ok", "failed"] = "failed" if findings else "ok"
    words = verdict(type(cfg).__name__, findings, layouts) if findings else ""
    return Outcome(name, status, words.replace("\n", "\n      "), time.perf_counter() - started)
