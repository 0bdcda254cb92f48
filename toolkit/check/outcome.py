"""Results of the checks, and how they are printed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

MARKS = {"ok": "ok  ", "failed": "FAIL", "not applicable": "n/a ", "not run": "-   "}


@dataclass(frozen=True)
class Outcome:
    """The result of one check."""

    name: str
    status: Literal["ok", "failed", "not applicable", "not run"]
    words: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        line = f"{MARKS[self.status]}  {self.name:<42} {self.seconds:5.2f} s"
        return f"{line}\n      {self.words}" if self.words else line


def report_of(title: str, outcomes: Iterable[Outcome], seconds: float) -> str:
    """Return `title`, one line for each check, the message of each failure (once, if repeated), and a summary."""
    outcomes = list(outcomes)
    first_names: dict[str, str] = {}
    shown = []
    for outcome in outcomes:
        first = first_names.setdefault(outcome.words, outcome.name)
        is_again = outcome.status == "failed" and first != outcome.name
        shown.append(str(replace(outcome, words=f"the same as: {first}") if is_again else outcome))
    waiting = sum(outcome.status == "not run" for outcome in outcomes)
    if waiting:
        shown[-waiting:] = [f"{MARKS['not run']}  {waiting} more checks skipped until this is fixed"]
    failed = [outcome.name for outcome in outcomes if outcome.status == "failed"]
    passed = sum(outcome.status == "ok" for outcome in outcomes)
    summary = f"{passed} checks passed" if not failed else f"{len(failed)} failed: {', '.join(failed)}"
    return "\n".join([title, *shown, f"{summary}; {seconds:.1f} s"])
