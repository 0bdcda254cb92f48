"""Calls of reward functions and environments that may raise, hang or return anything; no torch here.

A call in this process is interrupted by a signal when its time is up, which stops Python code and waiting, but not a
loop inside a C extension: for these there are worker processes (`toolkit.tasks.workers`).
"""

from __future__ import annotations

import asyncio
import itertools
import math
import numbers
import os
import signal
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolkit.errors import a_type, first_line

REPEAT_S = 0.5
"""Seconds until the signal comes again, for a function that catches everything."""
MOST_AT_ONCE = 64
"""Calls of an async reward that wait at the same time."""
OURS = tuple(
    os.path.join(*file)
    for file in (("tasks", "calls.py"), ("tasks", "workers.py"), ("tasks", "episodes.py"), ("asyncio", "tasks.py"))
)
"""Ends of the files whose steps a traceback of a reward leaves out."""
MOST_IN_A_ROW = 8
"""Calls in a row that time out or end their process, after which a step makes no more: all of them would take hours."""
MAX_SHOWN = 40
"""Characters of a wrong value in a message."""

Value = float | dict[str, float | None] | None
"""What a reward may be: a number, numbers by name, or None where it does not apply."""


@dataclass(frozen=True)
class Failure:
    """A call that gave no reward."""

    reason: str
    """One line."""
    traceback: str = ""
    """Of what it raised."""
    costs_time: bool = False
    """Whether it ran out of time or took its process with it."""


class _TimeIsUp(BaseException):
    """Raised inside a call; not an Exception, because functions catch these."""


def checked_value(result: Any) -> Value | Failure:
    """Return the reward that a function returned, or what is wrong with it."""
    if result is None:
        return None
    if isinstance(result, Mapping):
        parts: dict[str, float | None] = {}
        for name, part in result.items():
            number = None if part is None else checked_number(part)
            if isinstance(number, str):
                return Failure(f"its part {name!r} {number}")
            parts[str(name)] = number
        return parts or Failure("it returned an empty dict; return a number, or None where it does not apply")
    number = checked_number(result)
    return Failure(f"it {number}") if isinstance(number, str) else number


def checked_number(value: Any) -> float | str:
    """Return a finite float, or what is wrong: a clause that follows the name of what returned it."""
    if hasattr(value, "item") and not isinstance(value, numbers.Number):
        try:
            value = value.item()  # of numpy or torch
        except (TypeError, ValueError, RuntimeError):
            return f"returned {a_type(value)} of several numbers; return one"
    if isinstance(value, str):
        return f"returned the text {_shown(value)}; return a number"
    if not isinstance(value, numbers.Real):
        return f"returned {a_type(value)}; return a number, a dict of numbers, or None"
    number = float(value)
    return number if math.isfinite(number) else f"returned {number}; return a finite number, or None"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def checked_list(results: Any, number: int) -> list[Value | Failure]:
    """Return the rewards that a batched function returned for `number` completions."""
    if hasattr(results, "tolist"):
        results = results.tolist()  # of numpy or torch
    if isinstance(results, (str, bytes, Mapping)) or not hasattr(results, "__len__"):
        wrong = Failure(f"it returned {a_type(results)}; a batched reward returns a list")
        return [wrong] * number
    if len(results) != number:
        return [Failure(f"it returned {len(results)} rewards for {number} completions")] * number
    return [checked_value(result) for result in results]


def raised(error: BaseException) -> Failure:
    """Return the failure of a call that raised."""
    steps = traceback.TracebackException.from_exception(error)
    is_theirs = [not frame.filename.endswith(OURS) for frame in steps.stack]
    steps.stack = traceback.StackSummary.from_list(itertools.compress(steps.stack, is_theirs))
    return Failure(f"it raised {type(error).__name__}: {first_line(error)}", "".join(steps.format()))


def timed_out(seconds: float) -> Failure:
    """Return the failure of a call whose time was up."""
    return Failure(f"it ran longer than task.reward_timeout_s={seconds:g}", costs_time=True)


def call(function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Any:
    """Return what the function returns, or a `Failure`."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _call_with_alarm(function, arguments, seconds)
    return _call_in_thread(function, arguments, seconds)


def _call_with_alarm(function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Any:
    is_inside = True

    def on_alarm(number: int, frame: object) -> None:
        if is_inside:
            raise _TimeIsUp

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
    try:
        try:
            return function(**arguments)
        finally:
            is_inside = False
            signal.setitimer(signal.ITIMER_REAL, 0)
    except _TimeIsUp:
        return timed_out(seconds)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # also SystemExit: a reward never ends the run
        return raised(error)
    finally:
        is_inside = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _call_in_thread(function: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Any:
    """Signals are for the main thread; here a call that runs too long is left behind."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function(**arguments))
        except BaseException as error:
            results.append(raised(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return results[0] if results else timed_out(seconds)


def call_each(function: Callable[..., Any], calls: list[dict[str, Any]], seconds: float) -> list[Any]:
    """Return the results of a function for each of `calls`, one after the other, or failures.

    After `MOST_IN_A_ROW` calls in a row that ran out of time, the others fail like them.
    """
    results: list[Any] = []
    for arguments in calls:
        last = results[-MOST_IN_A_ROW:]
        if len(last) == MOST_IN_A_ROW and all(isinstance(r, Failure) and r.costs_time for r in last):
            results.append(results[-1])
        else:
            results.append(call(function, arguments, seconds))
    return results


def call_together(function: Callable[..., Any], calls: list[dict[str, Any]], seconds: float) -> list[Any]:
    """Return the results of an async function for each of `calls`, which wait together, or failures."""
    results: list[Any] = [timed_out(seconds)] * len(calls)

    async def one(index: int, turn: asyncio.Semaphore) -> None:
        async with turn:
            try:
                results[index] = await asyncio.wait_for(function(**calls[index]), seconds)
            except TimeoutError:
                results[index] = timed_out(seconds)
            except Exception as error:
                results[index] = raised(error)

    async def every() -> None:
        turn = asyncio.Semaphore(MOST_AT_ONCE)
        await asyncio.gather(*(one(index, turn) for index in range(len(calls))))

    # A notebook runs a loop in the main thread, so this one gets a thread; one that blocks is left behind.
    thread = threading.Thread(target=lambda: asyncio.run(every()), daemon=True)
    thread.start()
    rounds = -(-len(calls) // MOST_AT_ONCE)
    thread.join(seconds * rounds + 1)
    return list(results)
