"""What every policy loss must keep, checked on made-up tokens on the CPU, and said in words.

`alone.py` calls the function by itself, `placed.py` puts it under a small LM head with items, micro-batches and chunks.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from toolkit.conformance_suite import alone, placed
from toolkit.conformance_suite.subject import Failed, NotApplicable, Subject, load_subject, place_of
from toolkit.errors import ToolkitError

__all__ = ["Outcome", "Subject", "load_subject", "report", "run_suite"]

Check = Callable[[Subject], None]
FIRST: tuple[tuple[str, Check], ...] = (
    ("one loss for each token", alone.one_loss_for_each_token),
    ("inputs are left as they were", alone.inputs_unchanged),
    ("the same again when called again", alone.repeatable),
    ("keeps to the declared scope", alone.keeps_scope),
)
"""A loss that fails one of these fails those that follow, too, for reasons that would only confuse."""
OTHERS: tuple[tuple[str, Check], ...] = (
    ("gradient sign", alone.gradient_sign),
    ("every option matters", alone.options_matter),
    ("finite at log ratios of +-25 and +-100", alone.finite),
    ("precision", alone.precision),
    ("masked positions may hold NaN and inf", placed.masked_positions),
    ("micro-batches and packing do not matter", placed.partition),
    ("eager and chunk mode agree", placed.eager_equals_chunk),
    ("nothing to score gives 0", placed.nothing_to_score),
    ("low-precision inputs", placed.low_precision),
)
MARKS = {"ok": "ok  ", "failed": "FAIL", "not applicable": "n/a ", "not run": "-   "}


@dataclass(frozen=True)
class Outcome:
    """What came of one check."""

    name: str
    status: Literal["ok", "failed", "not applicable", "not run"]
    words: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        line = f"{MARKS[self.status]}  {self.name:<42} {self.seconds:5.2f} s"
        return f"{line}\n      {self.words}" if self.words else line


def run_suite(subject: Subject) -> list[Outcome]:
    """Run all checks; a broken loss makes outcomes, never an exception."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        outcomes: list[Outcome] = []
        for name, check in FIRST:
            outcomes.append(_outcome(name, check, subject))
            if outcomes[-1].status == "failed":
                left = [own for own, _ in (*FIRST, *OTHERS)][len(outcomes) :]
                return [*outcomes, *(Outcome(own, "not run") for own in left)]
        return [*outcomes, *(_outcome(name, check, subject) for name, check in OTHERS)]


def report(subject: Subject, outcomes: Iterable[Outcome], seconds: float) -> str:
    """Return one line for each check, what failed in words (the same words once), and a summary."""
    outcomes = list(outcomes)
    told: dict[str, str] = {}
    shown = []
    for outcome in outcomes:
        first = told.setdefault(outcome.words, outcome.name)
        is_again = outcome.status == "failed" and first != outcome.name
        shown.append(str(replace(outcome, words=f"the same as: {first}") if is_again else outcome))
    waiting = sum(outcome.status == "not run" for outcome in outcomes)
    if waiting:
        shown[-waiting:] = [f"{MARKS['not run']}  {waiting} more checks, when that is repaired"]
    options = ", ".join(f"{name}={value}" for name, value in subject.options.items()) or "no options"
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    passed = sum(outcome.status == "ok" for outcome in outcomes)
    summary = f"{passed} checks passed" if not failed else f"{len(failed)} failed: {', '.join(failed)}"
    lines = [f"{subject.loss.name} (scope {subject.loss.scope}; {options})", *shown]
    return "\n".join([*lines, f"{summary}; {seconds:.1f} s"])


def _outcome(name: str, check: Check, subject: Subject) -> Outcome:
    started = time.perf_counter()
    status: Literal["ok", "failed", "not applicable"] = "ok"
    words = ""
    try:
        check(subject)
    except NotApplicable as reason:
        status, words = "not applicable", f"not applicable: {reason}"
    except (Failed, ToolkitError) as error:
        status, words = "failed", str(error)
    except Exception as error:  # the user's function may raise anything
        status, words = "failed", f"it raised {type(error).__name__}: {error}{place_of(error, subject.loss)}"
    return Outcome(name, status, words, time.perf_counter() - started)
