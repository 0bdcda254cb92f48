"""The rules for all policy losses, checked on made-up tokens on the CPU.

`function_checks.py` calls only the function, `loss_checks.py` runs it on a small LM head with items, micro-batches and
chunks, `process_checks.py` runs it over several processes.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Literal

import torch

from toolkit.check import function_checks, loss_checks
from toolkit.check.outcome import Outcome
from toolkit.check.subject import Failed, NotApplicable, Subject
from toolkit.errors import ToolkitError
from toolkit.functional.scope_check import error_location

Check = Callable[[Subject], None]
FIRST: tuple[tuple[str, Check], ...] = (
    ("one loss for each token", function_checks.one_loss_for_each_token),
    ("inputs are left as they were", function_checks.inputs_unchanged),
    ("the same again when called again", function_checks.repeatable),
    ("keeps to the declared scope", function_checks.keeps_scope),
)
"""If a loss fails one of these, the later checks fail too, for confusing reasons, so they are skipped."""
OTHERS: tuple[tuple[str, Check], ...] = (
    ("gradient sign", function_checks.gradient_sign),
    ("every option matters", function_checks.options_matter),
    ("finite at log ratios of +-25 and +-100", function_checks.finite),
    ("precision", function_checks.precision),
    ("masked positions may hold NaN and inf", loss_checks.masked_positions),
    ("micro-batches and packing do not matter", loss_checks.partition),
    ("eager and chunk mode agree", loss_checks.eager_equals_chunk),
    ("nothing to score gives 0", loss_checks.nothing_to_score),
    ("low-precision inputs", loss_checks.low_precision),
)


def run_suite(subject: Subject) -> list[Outcome]:
    """Run all checks; a broken loss gives failed outcomes, never an exception."""
    with warnings.catch_warnings(action="ignore"), torch.random.fork_rng(devices=[]):
        outcomes: list[Outcome] = []
        for name, check in FIRST:
            outcomes.append(_outcome(name, check, subject))
            if outcomes[-1].status == "failed":
                skipped = [name for name, _ in (*FIRST, *OTHERS)][len(outcomes) :]
                return [*outcomes, *(Outcome(name, "not run") for name in skipped)]
        return [*outcomes, *(_outcome(name, check, subject) for name, check in OTHERS)]


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
        status, words = "failed", f"it raised {type(error).__name__}: {error}{error_location(error, subject.loss)}"
    return Outcome(name, status, words, time.perf_counter() - started)
