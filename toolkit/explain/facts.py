"""What each policy loss, KL estimator and aggregation does, in words for `explain`; no torch here.

A policy loss says its formula where it is registered; here stands what a formula does not show at a glance: which role
the ratio has, and where the gradient goes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from toolkit.functional.policy.registry import PolicyLoss

MISSING = re.compile(r"\[([^\[\]]*)\]")
"""A clause of a formula that depends on options: `filled`."""
CONDITION = re.compile(r"<([?!])(\w+)(?:=([^<>]*))?>")
"""What a choice of a clause asks of an option."""
LARGEST_LOG_RATIO = 68.7
"""Nats that fp32 holds after exp with room to spare: where ratios end that have no other ceiling."""


class Fact(NamedTuple):
    """What a formula does not show at a glance."""

    ratio: str
    """Whether the ratio is clipped, a weight, or not there at all."""
    gradient: str
    """Where the gradient is 0 and what it is elsewhere."""
    bound: str = "{ratios}; the gradient is 0 outside"
    """What the bounds of the log ratio do; empty where there is no ratio. All three are filled in as formulas are."""


RATIOS = "log ratios are held in {range} before exp"
_WEIGHTS = "the weight is computed from log ratios held in {range}; this takes no gradient from log pi"
_CLIPPED = "r is clipped and carries the gradient"
_WEIGHT = "r is a weight without gradient"
_NO_RATIO = "there is no ratio: nothing holds the policy near another one"
_SEQUENCE = "one for a whole sequence, is clipped and carries the gradient"
_BINDS = "0 where the clip binds (above the range with A > 0, below it with A < 0, beyond a dual clip with A < 0)"
_MASKED = "a mask looks at how far the probability itself moved"
_DPPO = Fact(
    "[<?form=score>r is a weight without gradient // r carries the gradient][, at most {clip_ratio_c}]; " + _MASKED,
    "0 for masked tokens[<?form=ratio> and where r > {clip_ratio_c}], "
    "else -[<?form=score>min(r, {clip_ratio_c}) // r] A grad log pi[<?log_ratio_sq_coef>, + that of (log r)^2]",
    f"[<?form=score>{_WEIGHTS}[<?log_ratio_sq_coef>; (log r)^2 has none outside] // "
    "{ratios}; the gradient is 0 outside]",
)

POLICY_FACTS: dict[str, Fact] = {
    "vanilla": Fact(_CLIPPED, f"{_BINDS}, else -A r grad log pi"),
    "gspo": Fact(
        f"s, {_SEQUENCE}",
        "flows through the mean: -A s / n for each of a sequence's n tokens; 0 for all of them where the clip binds",
    ),
    "gspo_token": Fact(
        f"s, {_SEQUENCE} of each token alone",
        "-A s for each token with its own A; with one A per sequence and a mean per sequence the same as gspo's",
    ),
    "segment_ratio": Fact(
        "u, one for a turn, is clipped and carries the gradient",
        "flows through the mean of the turn; where the clip binds the whole turn has 0",
    ),
    "luspo": Fact(f"s, {_SEQUENCE}", "gspo's times the length n: -A s for each token; where the clip binds 0"),
    "cispo": Fact(
        f"{_WEIGHT}; the weight is clipped",
        "a clipped token still learns: -weight A grad log pi everywhere"
        "[<?use_unified_mask> but where PPO would clip: 0]",
        _WEIGHTS,
    ),
    "tis": Fact(
        f"{_WEIGHT}; the weight is truncated", "a truncated token still learns, with the bound as its weight", _WEIGHTS
    ),
    "topr": Fact(
        f"{_WEIGHT} where A <= 0 and not there where A > 0",
        "-A grad log pi where A > 0, however old the sample; else faded with the ratio",
        _WEIGHTS,
    ),
    "topr_sequence": Fact(
        "R, [<?token_ratio>one for each token // one for a sequence], is a weight without gradient for sequences with "
        "A <= 0 and not there for the others",
        "-A grad log pi for good sequences; bad ones fade with [<?token_ratio>each token's ratio // "
        "their product of ratios]",
        _WEIGHTS,
    ),
    "vespo": Fact(
        "w, one for a sequence, shapes a weight without gradient",
        "-phi(w) A grad log pi; phi has its peak near w = 1 and goes to 0 on both sides, never exactly 0",
        "each token's log ratio is held in {range} and within +-20, log w between -18.4 and 20; this takes no gradient "
        "from log pi",
    ),
    "rollout_is": Fact(
        f"{_WEIGHT}, and decides by itself which tokens count",
        "exactly 0 outside the open range, else -r A grad log pi (a clamp instead of the mask would leave a gradient)",
        _WEIGHTS,
    ),
    "sapo": Fact(
        "r stands in a smooth gate and carries the gradient",
        "-4 g (1 - g) r A, g the sigmoid: -A at r = 1, towards 0 on both sides, never exactly 0",
    ),
    "sapo_sequence": Fact(
        "s, one for a sequence, stands in a smooth gate and carries the gradient",
        "flows through the mean of the sequence; fades smoothly as s leaves 1",
    ),
    "gmpo": Fact(
        "log ratios are clipped on the side of A's sign; their mean carries the gradient",
        "a clipped token has 0, the others of its sequence go on: -A (geometric mean) / n each",
    ),
    "dppo_tv": _DPPO,
    "dppo_kl": _DPPO,
    "ipo": Fact(
        f"r carries the gradient and is not clipped; {_MASKED}",
        "of the first term 0 for masked tokens[<?log_ratio_sq_coef>; the squared log ratio holds on to all tokens]",
    ),
    "reinforce": Fact(_NO_RATIO, "-A grad log pi", ""),
    "gpg": Fact(_NO_RATIO, "-A grad log pi", ""),
    "is_reinforce": Fact(
        "r carries the gradient and is not clipped", "-A r grad log pi, however large r is: a single token can dominate"
    ),
    "nll": Fact(
        _NO_RATIO,
        "-grad log pi [<?only_positive>where A > 0, else 0: only the sign of A is read // everywhere: A is not read]",
        "",
    ),
    "kimi": Fact(
        "the log ratio stands in a quadratic penalty and carries a gradient",
        "(-A + tau log r) grad log pi[<?tau>: 0 where log r = A / tau, and back beyond]",
        "the penalty is computed from log ratios held in {range}; outside it has no gradient, and -A grad log pi stays",
    ),
    "fipo": Fact(
        "r is clipped and carries the gradient; those of the following tokens make a weight without gradient",
        f"{_BINDS}, else -w A r grad log pi",
    ),
    "real": Fact(
        "the mean log ratio of a sequence is its score in a classification",
        "bounded; A gives the label alone; a completion that is ranked right already has nearly none",
        "mean log ratios are held in {range}; the gradient is 0 outside",
    ),
    "rloo_sequence": Fact(
        f"R, a product, {_SEQUENCE}",
        "-A R for each token; where the clip binds the whole sequence has 0, which happens soon to long ones",
    ),
    "clip_cov": Fact(_CLIPPED, f"{_BINDS} and for the tokens that are drawn, else -A r grad log pi"),
    "kl_cov": Fact(
        "r carries the gradient and is not clipped", "-A r grad log pi, for the penalised tokens also that of |log r|"
    ),
    "aspo": Fact(
        "where A > 0 the inverse ratio is a weight without gradient; elsewhere r is clipped and carries the gradient",
        "-A / r where A > 0 (0 above the range; a capped weight goes on learning), PPO's elsewhere",
        "{ratios}; the gradient is 0 outside where A <= 0, and the weight where A > 0 takes none from log pi",
    ),
    "opd": Fact(
        "r carries the gradient; log(pi_teacher / pi) stands in for the advantage, without gradient",
        "in expectation that of KL(policy || teacher); the items' own advantages are not read",
    ),
    "sdar": Fact(
        _NO_RATIO, "raises every token by a gate that closes where the teacher likes it less; A is not read", ""
    ),
}
POLICY_FACTS["dro"] = POLICY_FACTS["kimi"]

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


_BY_20 = r"(?:in bounding|Bounds) \|[^|]+\|(?: and the sum)? by 20 nats(?: before exp)?"
BOUND_BY_20 = (
    (rf",? and {_BY_20}", ""),
    (rf" (?:Differs (?:from them )?)?{_BY_20}\.", ""),
    (rf"{_BY_20}, and ", ""),
    (rf"{_BY_20} and ", "in bounding "),
)
"""What sources say of the usual bounds, and what stays of it under others."""


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
    return f"{loss.function.__name__}({', '.join(filter(None, ['t', call]))}), which states no formula"


def fact_of(loss: PolicyLoss, options: Mapping[str, Any], log_ratio_range: Sequence[float | None]) -> Fact | None:
    """Return what is known of a built-in loss with these options, None for one of the user's own."""
    fact = POLICY_FACTS.get(loss.name)
    if fact is None or not loss.function.__module__.startswith("toolkit."):
        return None
    ratio, gradient, bound = (filled(text, {**options, "ratios": "{ratios}", "range": "{range}"}) for text in fact)
    within = range_words(log_ratio_range)
    return Fact(ratio, gradient, bound.replace("{ratios}", RATIOS).replace("{range}", within))


def range_words(log_ratio_range: Sequence[float | None]) -> str:
    """Say between which nats log ratios are held."""
    low, high = log_ratio_range
    is_largest = high is None or high > LARGEST_LOG_RATIO
    ends = f"[{'-inf' if low is None else f'{low:g}'}, {LARGEST_LOG_RATIO if is_largest else high:g}] nats"
    return ends + (" (the ceiling is what fp32 can hold)" if is_largest else "")


def title_of(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring without its full stop, empty where there is none."""
    return (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")


def source_of(function: Callable[..., Any], *, usual_range: bool = True) -> str:
    """Return the part of a docstring after ``Source:`` as one line, empty where there is none.

    Args:
        function: whose docstring it is.
        usual_range: whether log ratios are bounded by 20 nats; False: what the docstring says of that is left out.
    """
    _, found, source = (inspect.getdoc(function) or "").partition("\nSource:")
    text = " ".join(source.split("\n\n")[0].split()) if found else ""
    for pattern, instead in () if usual_range else BOUND_BY_20:
        text = re.sub(pattern, instead, text)
    return text
