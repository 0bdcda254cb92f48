"""What each policy loss, KL estimator and aggregation does, in words for `explain`; no torch here.

Each policy loss registers its facts; this file has what all share, and fills in the options.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from toolkit.compose.settings import as_written
from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import PolicyLoss

CLAUSE = re.compile(r"\[([^\[\]]*)\]")
"""A clause of a formula that depends on options; see `filled`."""
CONDITION = re.compile(r"<([?!])(\w+)(?:=([^<>]*))?>")
"""A condition of a clause on an option."""
LARGEST_LOG_RATIO = 68.7
"""Ceiling of log ratios without another ceiling, in nats: fp32 holds exp of it with room to spare."""


RATIOS = "log ratios are held in {range} before exp"

KL_EQUATIONS: dict[str, str] = {
    "k1": "d",
    "abs": "|d|",
    "k2": "d^2 / 2",
    "k3": "exp(-d) - 1 + d",
}
"""Equations of the estimators; d = log pi - log pi_ref of the sampled token."""

KL_GRADIENT_WORDS: dict[str, str] = {
    "as_is": "that of the value, by autograd",
    "straight_through": "that of k2, which is d",
    "score_corrected": "that of the value, plus value x grad log pi (the score-function term)",
    "is_corrected": "that of the value plus the score-function term, reweighted by the ratio to pi_{anchor}",
    "is_corrected by sequence": "by the product rule, also through the geometric mean of the sequence's ratios to "
    "pi_{anchor}, which multiplies the value",
}


class Aggregation(NamedTuple):
    """One aggregation in symbols and in words."""

    weight: str
    words: str


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": Aggregation("1 / N", "the mean over all N scored tokens; long completions weigh more"),
    "token_sum": Aggregation("1", "the sum over all scored tokens, not divided: its scale grows with the batch"),
    "seq_mean_token_mean": Aggregation(
        "1 / (S n)", "the mean over S sequences of the mean over their n scored tokens; each completion weighs the same"
    ),
    "seq_mean_token_sum": Aggregation("1 / S", "the mean over S sequences of the sum over their scored tokens"),
    "constant": Aggregation("1 / (S {length})", "the sum over tokens / (S sequences x a fixed {length} tokens)"),
    "square": Aggregation(
        "n^-1/2 / W", "a mean with weight n^-1/2 for each token of a sequence of n tokens; W: the sum of the weights"
    ),
    "prompt_mean": Aggregation("1 / (P N_p)", "the mean over P prompts of the mean over the N_p tokens of each prompt"),
    "per_component": Aggregation(
        "{positive_weight} / N+ where A > 0, {negative_weight} / N- elsewhere",
        "{positive_weight} x the mean over the N+ tokens with A > 0, plus {negative_weight} x that over the N- others",
    ),
}


def filled(formula: str, options: Mapping[str, Any]) -> str:
    """Put the values of `options` into a formula.

    ``{name}`` is an option's value. A clause ``[a // b]`` becomes a, or b if a does not hold, or nothing if neither
    does. A choice holds if none of its options is None and all of its conditions are met; conditions are not shown.
    They are ``<?name>`` (the option is true, or a number other than 0), ``<!name>`` (it is not), ``<?name=1>`` and
    ``<!name=1>`` (its command-line spelling is 1, or is not). Clauses may be nested; inner ones are filled in first.
    """

    def is_met(sign: str, name: str, wanted: str) -> bool:
        value = options[name]
        return (shown(value) == wanted if wanted else bool(value)) == (sign == "?")

    def clause(match: re.Match[str]) -> str:
        for choice in match[1].split(" // "):
            has_values = all(options[name] is not None for name in re.findall(r"\{(\w+)\}", choice))
            if has_values and all(is_met(*condition) for condition in CONDITION.findall(choice)):
                return CONDITION.sub("", choice)
        return ""

    while CLAUSE.search(formula):
        formula = CLAUSE.sub(clause, formula)
    return formula.format_map({name: shown(value) for name, value in options.items()})


def shown(value: Any) -> str:
    """Return a value as the command line spells it, floats with six digits."""
    return f"{value:g}" if isinstance(value, float) else as_written(value)


def shown_all(options: Mapping[str, Any]) -> str:
    """Return options as ``name=value, ...``."""
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())


def equation(loss: PolicyLoss, options: Mapping[str, Any]) -> str:
    """Return one token's loss with numbers filled in; the signature if a loss has no formula."""
    if loss.formula:
        return filled(loss.formula, options)
    return f"{loss.function.__name__}({', '.join(filter(None, ['t', shown_all(options)]))}) (no formula registered)"


def facts_of(loss: PolicyLoss, options: Mapping[str, Any], log_ratio_range: Sequence[float | None]) -> LossFacts | None:
    """Return the registered facts of a loss with these options filled in; None if it registers none."""
    if not loss.facts.ratio:
        return None
    within = range_words(log_ratio_range)
    texts = {
        name: filled(getattr(loss.facts, name), {**options, "ratios": "{ratios}", "range": "{range}"})
        .replace("{ratios}", RATIOS)
        .replace("{range}", within)
        for name in ("ratio", "gradient", "bound")
    }
    return replace(loss.facts, **texts)


def range_words(log_ratio_range: Sequence[float | None]) -> str:
    """Return the range that log ratios are held in, in words."""
    low, high = log_ratio_range
    is_largest = high is None or high > LARGEST_LOG_RATIO
    ends = f"[{'-inf' if low is None else f'{low:g}'}, {LARGEST_LOG_RATIO if is_largest else high:g}] nats"
    return ends + (" (the ceiling is what fp32 can hold)" if is_largest else "")


def title_of(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring without its full stop; empty if there is no docstring."""
    return (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")
