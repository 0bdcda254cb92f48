"""What every policy loss must keep, checked on made-up tokens on the CPU, and said in words.

`alone.py` calls the function by itself, `placed.py` puts it under a small LM head with items, micro-batches and chunks.
"""

from __future__ import annotations

import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from toolkit.conformance_suite import alone, placed
from toolkit.conformance_suite.subject import Failed, NotApplicable, Subject, load_subject
from toolkit.errors import ToolkitError

__all__ = ["Outcome", "Subject", "load_subject", "report", "run_suite"]

Check = Callable[[Subject], None]
FIRST: tuple[tuple[str, Check], ...] = (
    ("one loss for each token", alone.one_loss_for_each_token),
    ("inputs are left as they were", alone.inputs_unchanged),
    ("keeps to the declared scope", alone.keeps_scope),
)
"""A loss that fails one of these fails the others, too, for reasons that would only confuse."""
OTHERS: tuple[tuple[str, Check], ...] = (
    ("the same again when called again", alone.repeatable),
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
        outcomes = [_outcome(name, check, subject) for name, check in FIRST]
        broken = [outcome.name for outcome in outcomes if outcome.status == "failed"]
        if broken:
            return [*outcomes, *(Outcome(name, "not run", f"first repair: {broken[0]}") for name, _ in OTHERS)]
        return [*outcomes, *(_outcome(name, check, subject) for name, check in OTHERS)]


def report(subject: Subject, outcomes: Iterable[Outcome], seconds: float) -> str:
    """Return one line for each check, what failed in words, and a summary."""
    outcomes = list(outcomes)
    options = ", ".join(f"{name}={value}" for name, value in subject.options.items()) or "no options"
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    passed = sum(outcome.status == "ok" for outcome in outcomes)
    summary = f"{passed} checks passed" if not failed else f"{len(failed)} failed: {', '.join(failed)}"
    lines = [f"{subject.loss.name} (scope {subject.loss.scope}; {options})", *map(str, outcomes)]
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
        status, words = "failed", f"it raised {type(error).__name__}: {error}{_place(error, subject)}"
    return Outcome(name, status, words, time.perf_counter() - started)


def _place(error: Exception, subject: Subject) -> str:
    """Return the line of the loss's own file that raised."""
    own = subject.loss.function.__code__.co_filename if hasattr(subject.loss.function, "__code__") else ""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == own]
    return f" ({Path(own).name}:{lines[-1]})" if lines else ""
