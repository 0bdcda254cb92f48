"""The checks of `toolkit.check` and `toolkit.testing` on a runner's loss, as a result that shows itself."""

from __future__ import annotations

import time
from dataclasses import dataclass

from toolkit.check.outcome import Outcome, report_of
from toolkit.check.subject import Subject
from toolkit.check.suite import run_suite
from toolkit.display import html_table
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.testing import LayoutError, assert_layout_invariant


@dataclass(frozen=True)
class CheckReport:
    """What the checks of a loss found; true if all passed."""

    title: str
    outcomes: tuple[Outcome, ...]
    seconds: float

    def __bool__(self) -> bool:
        """Whether no check failed."""
        return all(outcome.status != "failed" for outcome in self.outcomes)

    def __repr__(self) -> str:
        return report_of(self.title, self.outcomes, self.seconds)

    def _repr_html_(self) -> str:
        rows = [(each.status, each.name, f"{each.seconds:.2f}", each.words) for each in self.outcomes]
        return html_table(self.title, ("", "check", "time (s)", ""), rows)


def check_loss(loss_cfg: BaseLossConfig) -> CheckReport:
    """Check a loss on made-up batches on the CPU.

    A policy loss goes through the rules for all policy losses; every loss, in one process, through micro-batches and
    packed rows.
    """
    started = time.perf_counter()
    outcomes: list[Outcome] = []
    title = type(loss_cfg).__name__
    if isinstance(loss_cfg, BaseRLLossConfig) and loss_cfg.candidates is None:
        subject = Subject(loss_cfg.policy, loss_cfg.policy_options)
        title = str(subject)
        outcomes = run_suite(subject)
    if all(outcome.status != "failed" for outcome in outcomes):
        outcomes.append(_layouts(loss_cfg))
    return CheckReport(title, tuple(outcomes), time.perf_counter() - started)


def _layouts(loss_cfg: BaseLossConfig) -> Outcome:
    name, started = "every layout of a batch is the same", time.perf_counter()
    try:
        assert_layout_invariant(loss_cfg, processes=1, sequence_parallel=1)
    except LayoutError as error:
        return Outcome(name, "failed", str(error), time.perf_counter() - started)
    return Outcome(name, "ok", "", time.perf_counter() - started)
