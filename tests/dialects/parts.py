"""Pieces that several dialects share: renaming of parameters, corrections, counts of an input."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tests.golden_data import Case, Params

Fields = dict[str, Any]
NO_KL: Fields = {
    "use_kl_loss": False,
    "kl_loss_type": None,
    "kl_gradient": "as_is",
    "kl_anchor": "old",
    "kl_ratio_level": "token",
    "kl_input_clamp": "auto",
    "kl_output_clamp": "auto",
}
"""What takes the KL term out of a preset that has one."""


def renamed(given: Params, names: Mapping[str, str]) -> Fields:
    """Return those of the peer's parameters that `names` lists, by our names."""
    fields = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    if "cliprange_low" in fields:  # a floor below 0 is below every ratio, and so is 0
        fields["cliprange_low"] = min(fields["cliprange_low"], 1.0)
    return fields


def check_selects(case: Case, name: str, *allowed: Any) -> None:
    """Read a parameter that picks the loss, which the preset of the entry is already; None stands for "not given"."""
    value = case.params.get(name)
    assert value in allowed, f"{case.peer}: {name}={value!r} is another loss than entry {case.entry!r}, {allowed}"


def without_effect(entries: Iterable[str], names: Iterable[str], reason: str) -> dict[str, str]:
    """Return the part of an ``IGNORED`` that says of each of some entries that it does not use some parameters."""
    return {f"{entry}/{name}": reason for entry in entries for name in names}


def count_scale(case: Case, rows: float, tokens: float, *, is_per_token: bool) -> float:
    """Return what our mean is multiplied by where the call says the counts of a whole step, and its ranks.

    Args:
        case: may give ``dp_size``, ``batch_num_tokens`` and ``global_batch_size``; a peer multiplies by the first
            because the gradients of its ranks are averaged afterwards.
        rows: what our mean over sequences divides by.
        tokens: what our mean over tokens divides by.
        is_per_token: which of the two the case has.
    """
    params = case.params.over({"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": rows})
    step_tokens, step_rows = (float(params[name] or 0) for name in ("batch_num_tokens", "global_batch_size"))
    share = tokens / (step_tokens or tokens) if is_per_token else rows / (step_rows or rows)
    return float(params["dp_size"]) * share


def preset_of(case: Case) -> str:
    """Return the preset of a case: ``<peer>/<entry>``, with underscores for "+" and "-"."""
    return f"{case.peer}/{case.entry.lower().replace('+', '_').replace('-', '_')}"


def unit(level: str) -> Fields:
    """Return the granularity and reduction of a token, or of a sequence's product or geometric mean."""
    if level == "token":
        return {"granularity": "token"}
    return {"granularity": "sequence", "reduction": {"geometric": "mean", "product": "sum"}[level]}


def weight(lower: float | None, upper: float | None, **fields: Any) -> Fields:
    """Return a correction that weights by the ratio to the sampler, kept between the bounds."""
    bounds = {"action": "clamp_upper"} if lower is None else {"action": "clamp", "lower": lower}
    return {"statistic": "ratio", **bounds, "upper": upper, **fields}


def rejection(lower: float | None, upper: float | None, **fields: Any) -> Fields:
    """Return a correction that leaves out what lies outside the bounds; it still counts in the denominator."""
    bounds = {"action": "mask", "lower": lower, "upper": upper, "denominator": "original"}
    return {"statistic": "ratio", **bounds, **fields}


def shrunk(values: Tensor, mask: Tensor, epsilon: float) -> Tensor:
    """Return [B, T] `values` as if a mean over the n scored tokens of each row had divided by n + epsilon."""
    if epsilon == 0:
        return values
    counts = mask.sum(-1, keepdim=True).double()
    return values * counts / (counts + epsilon)


def scored_tokens(case: Case) -> int:
    """Return how many tokens of a case's input are scored."""
    return int(case.inputs["response_mask"].sum())


def scored_rows(case: Case) -> int:
    """Return how many rows of a case's input have a scored token."""
    return int((case.inputs["response_mask"].sum(-1) > 0).sum())
