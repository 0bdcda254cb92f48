"""What each policy loss, KL estimator and aggregation does, in words for `explain`; no torch here.

A policy loss says its formula where it is registered; here stands what a formula does not show at a glance: which role
the ratio has, and where the gradient goes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from toolkit.functional.registry import PolicyLoss

MISSING = re.compile(r"\[([^\[\]]*)\]")
"""A clause of a formula that depends on options which may be None."""


class Fact(NamedTuple):
    """What a formula does not show at a glance."""

    ratio: str
    """Whether the ratio is clipped, a weight, or not there at all."""
    gradient: str
    """Where the gradient is 0 and what it is elsewhere."""


_CLIPPED = "r is clipped and carries the gradient"
_WEIGHT = "r is a weight without gradient"
_NO_RATIO = "there is no ratio: nothing holds the policy near another one"
_SEQUENCE = "one for a whole sequence, is clipped and carries the gradient"
_BINDS = "0 where the clip binds (above the range with A > 0, below it with A < 0, beyond a dual clip with A < 0)"
_MASKED = "r carries the gradient and is not clipped; a mask looks at how far the probability itself moved"

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
        "a clipped token still learns: -weight A grad log pi everywhere (with use_unified_mask 0 where PPO would clip)",
    ),
    "tis": Fact(f"{_WEIGHT}; the weight is truncated", "a truncated token still learns, with the bound as its weight"),
    "topr": Fact(
        f"{_WEIGHT} where A <= 0 and not there where A > 0",
        "-A grad log pi where A > 0, however old the sample; else faded with the ratio, at most in full",
    ),
    "topr_sequence": Fact(
        "R, one for a sequence, is a weight without gradient for sequences with A <= 0 and not there for the others",
        "-A grad log pi for good sequences; bad ones fade with their product of ratios",
    ),
    "vespo": Fact(
        "w, one for a sequence, shapes a weight without gradient",
        "-phi(w) A grad log pi; phi has its peak near w = 1 and goes to 0 on both sides, never exactly 0",
    ),
    "rollout_is": Fact(
        f"{_WEIGHT}, and decides by itself which tokens count",
        "exactly 0 outside the open range, else -r A grad log pi (a clamp instead of the mask would leave a gradient)",
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
    "dppo_tv": Fact(_MASKED, "0 for masked tokens, else -r A grad log pi"),
    "dppo_kl": Fact(_MASKED, "0 for masked tokens, else -r A grad log pi"),
    "ipo": Fact(_MASKED, "of the first term 0 for masked tokens; the squared log ratio holds on to all tokens"),
    "reinforce": Fact(_NO_RATIO, "-A grad log pi"),
    "gpg": Fact(_NO_RATIO, "-A grad log pi"),
    "is_reinforce": Fact(
        "r carries the gradient and is not clipped", "-A r grad log pi, however large r is: a single token can dominate"
    ),
    "nll": Fact(_NO_RATIO, "-grad log pi for the tokens that count, 0 for the others; A gives the sign alone"),
    "kimi": Fact(
        "the log ratio stands in a quadratic penalty and carries a gradient",
        "(-A + tau log r) grad log pi: 0 where log r = A / tau, and back beyond",
    ),
    "fipo": Fact(
        "r is clipped and carries the gradient; those of the following tokens make a weight without gradient",
        f"{_BINDS}, else -w A r grad log pi",
    ),
    "real": Fact(
        "the mean log ratio of a sequence is its score in a classification",
        "bounded; A gives the label alone; a completion that is ranked right already has nearly none",
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
    ),
    "opd": Fact(
        "r carries the gradient; log(pi_teacher / pi) stands in for the advantage, without gradient",
        "in expectation that of KL(policy || teacher); the items' own advantages are not read",
    ),
    "sdar": Fact(_NO_RATIO, "raises every token by a gate that closes where the teacher likes it less; A is not read"),
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
CE_AGGREGATIONS = {"token": "token_mean", "sample": "seq_mean_token_mean", "square": "square"}
"""Which aggregation each ``loss_reduction`` of cross-entropy is."""


def filled(formula: str, options: Mapping[str, Any]) -> str:
    """Put the values of `options` into a formula; see `PolicyLoss.formula` for its clauses in brackets."""

    def clause(found: re.Match[str]) -> str:
        for choice in found[1].split(" // "):
            if all(options[name] is not None for name in re.findall(r"\{(\w+)\}", choice)):
                return choice
        return ""

    return MISSING.sub(clause, formula).format_map({name: shown(value) for name, value in options.items()})


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


def title_of(function: Callable[..., Any]) -> str:
    """Return the first line of a docstring without its full stop, empty where there is none."""
    return (inspect.getdoc(function) or "").split("\n")[0].rstrip(".")


def source_of(function: Callable[..., Any]) -> str:
    """Return the part of a docstring after ``Source:`` as one line, empty where there is none."""
    _, found, source = (inspect.getdoc(function) or "").partition("\nSource:")
    return " ".join(source.split("\n\n")[0].split()) if found else ""
