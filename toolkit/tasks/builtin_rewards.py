"""Rewards that come with the toolkit; each is a function like a user's. No torch here."""

from __future__ import annotations

import logging
import math
import re
from fractions import Fraction
from typing import Any

NEEDS = {
    "answer": "; the reference answer is the column that task.answer_column names",
    "pattern": "; set task.pattern to a regular expression, or give the data such a column",
    "target_length": "; set task.target_length in tokens, or give the data such a column",
}
"""Argument of a built-in reward -> where it comes from, for messages."""
NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?:/\d+)?|[-+]?\.\d+")
"""An integer, with thousands separated or not, a decimal number or a fraction."""
CLOSE = 1e-6
"""Relative difference of two numbers that counts as rounding."""


def exact_match(completion: str, answer: Any) -> float | None:
    """Return 1 if the completion is the answer, spaces around both ignored; None without an answer."""
    return None if answer is None else float(completion.strip() == str(answer).strip())


def numeric(completion: str, answer: Any) -> float | None:
    """Return 1 if the last number of the completion is that of the answer (1,000 = 1000, 1/2 = 0.5); None if none."""
    if answer is None:
        return None
    expected, written = _last_number(str(answer)), _last_number(completion)
    if expected is None:
        raise ValueError(f"the answer {answer!r} holds no number")
    return float(written is not None and math.isclose(written, expected, rel_tol=CLOSE, abs_tol=1e-12))


def _last_number(text: str) -> float | None:
    numbers = NUMBER.findall(text)
    if not numbers:
        return None
    digits = numbers[-1].replace(",", "")
    try:
        return float(Fraction(digits)) if "/" in digits else float(digits)
    except (ZeroDivisionError, OverflowError):
        return None


def regex(completion: str, pattern: str, answer: Any = None) -> float:
    r"""Return 1 if the pattern matches somewhere; if it has a group and there is an answer, the group must be it.

    ``#### (-?\d+)`` takes the number after the signs that GSM8K's answers have.
    """
    matches = list(re.finditer(pattern, completion, re.DOTALL))
    if not matches:
        return 0.0
    if answer is None or not matches[-1].groups():
        return 1.0
    return float((matches[-1].group(1) or "").strip() == str(answer).strip())


def format(completion: str, pattern: str) -> float:
    """Return 1 if the pattern matches the completion from its start to its end, e.g. ``<think>.*</think>.*``."""
    return float(re.fullmatch(pattern, completion.strip(), re.DOTALL) is not None)


def length(num_tokens: int, target_length: int) -> float:
    """Return 1 for a completion of at most `target_length` tokens, falling to 0 at twice as many."""
    return min(1.0, max(0.0, 2 - num_tokens / target_length))


def math_verify(completion: str, answer: Any) -> float | None:
    """Return 1 if the completion's mathematical answer equals the reference, by ``math-verify``; None without one.

    Called in a worker process only: its time limits are signals of the main thread, and some answers take for ever.
    """
    if answer is None:
        return None
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    reference = str(answer)
    is_marked = "$" in reference or "\\boxed" in reference
    gold = parse(reference if is_marked else f"${reference}$", parsing_timeout=None)
    gold = gold or parse(reference, parsing_timeout=None)
    return float(verify(gold, parse(completion, parsing_timeout=None), timeout_seconds=None))
