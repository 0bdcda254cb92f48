"""What each policy loss, KL estimator and aggregation does, in words for `explain`; no torch here.

What is true of one policy loss stands at its registration; here is what all share, and how options are filled in.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from toolkit.functional.policy.facts import LossFacts
from toolkit.functional.policy.registry import PolicyLoss

MISSING = re.compile(r"\[([^\[\]]*)\]")
"""A clause of a formula that depends on options: `filled`."""
CONDITION = re.compile(r"<([?!])(\w+)(?:=([^<>]*))?>")
"""What a choice of a clause asks of an option."""
LARGEST_LOG_RATIO = 68.7
"""Nats that fp32 holds after exp with room to spare: where ratios end that have no other ceiling."""


RATIOS = "log ratios are held in {range} before exp"

KL_EQUATIONS: dict[str, str] = {
    "k1": "d",
    "abs": "|d|",
    "k2": "d^2 / 2",
    "k3": "exp(-d) - 1 + d",
}
"""Of the estimators; d = log pi - log pi_ref of the sampled token."""

KL_GRADIENT_WORDS: dict[str, str] = {
    "as_is": "what autograd makes of the value",
    "straight_through": "that of k2, which is d",
    "score_corrected": "its own, plus value x grad log pi (the score-function term)",
    "is_corrected": "its own and the score-function term, reweighted by the ratio to pi_{anchor}",
}


class Aggregation(NamedTuple):
    """One aggregation in symbols and in words."""

    weight: str
    words: str


AGGREGATIONS: dict[str, Aggregation] = {
    "token_mean": Aggregation("1 / N", "the mean over all N scored tokens; long completions weigh more"),
    "token_sum": Aggregation("1", "the sum over all scored tokens, divided by nothing: its scale grows with the batch"),
    "seq_mean_token_mean": Aggregation(
        "1 / (S n)", "the mean over S sequences of the mean over their n scored tokens; each completion weighs the same"
    ),
    "seq_mean_token_sum": Aggregation("1 / S", "the mean over S sequences of the sum over their scored tokens"),
    "constant": Aggregation("1 / (S {length})", "the sum over tokens over S sequences of a fixed {length} tokens"),
    "square": Aggregation(
        "n^-1/2 / W", "a mean with weight n^-1/2 for each token of a sequence of n, W the sum of these weights"
    ),
    "prompt_mean": Aggregation("1 / (P N_p)", "the mean over P prompts of the mean over the N_p tokens of each prompt"),
    "per_component": Aggregation(
        "{positive_weight} / N+ where A > 0, {negative_weight} / N- elsewhere",
        "{positive_weight} x the mean over the N+ tokens with A > 0, plus {negative_weight} x that over the N- others",
    ),
}


def filled(formula: str, options: Mapping[str, Any]) -> str:
    """Put the values of `options` into a formula.

    ``{name}`` is an option's value. A clause ``[a // b]`` reads a, or b where a does not hold; without a choice that
    holds it is left out. A choice holds if none of its options is None and all its conditions are met, which are not
    shown: ``<?name>`` (the option is true, or a number other than 0), ``<!name>`` (it is not), ``<?name=1>`` and
    ``<!name=1>`` (it reads so on the command line, or not). Clauses may hold clauses; the inner ones come first.
    """

    def is_met(sign: str, name: str, wanted: str) -> bool:
        value = options[name]
        return (shown(value) == wanted if wanted else bool(value)) == (sign == "?")

    def clause(found: re.Match[str]) -> str:
        for choice in found[1].split(" // "):
            is_given = all(options[name] is not None for name in re.findall(r"\{(\w+)\}", choice))
            if is_given and all(is_met(*condition) for condition in CONDITION.findall(choice)):
                return CONDITION.sub("", choice)
        return ""

    while MISSING.search(formula):
        formula = MISSING.sub(clause, formula)
    return formula.format_map({name: shown(value) for name, value in options.items()})


def shown(value: Any) -> str:
    """Return a value as the command line spells it."""
    if isinstance(value, float):
        return f"{value:g}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def equation(loss: PolicyLoss, options: Mapping[str, Any]) -> str:
    """Return one token's loss with numbers filled in; of a loss without a formula its signature."""
    if loss.formula:
        return filled(loss.formula, options)
    call = ", ".join([f"{name}={shown(value)}" for name, value in options.items()])
    return f"{loss.function.__name__}({', '.join(filter(None, ['t', call]))}) (no formula registered)"


def facts_of(loss: PolicyLoss, options: Mapping[str, Any], log_ratio_range: Sequence[float | None]) -> LossFacts | None:
    """Return what is registered of a loss with these options filled in; None where nothing is said of its ratio."""
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
    """Say between which nats log ratios are held."""
    low, high = log_ratio_range
    is_largest = high is None or high > LARGEST_LOG_RATIO
    ends = f"[{'-inf' if low is None else f'{low:g}'}, {LARGEST_LOG_RATIO if is_largest else high:g}] nats"
    return ends + (" (the ceiling is what fp32 can hold)" if is_largest else "")


def title_of(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring without its full stop, empty where there is none."""
    return (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")
