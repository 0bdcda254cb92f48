"""Pieces that several dialects share: renaming of parameters, corrections, counts of an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from tests.golden_data import Case

Fields = dict[str, Any]
NO_KL: Fields = {
    "use_kl_loss": False,
    "kl_loss_type": None,
    "kl_gradient": "as_is",
    "kl_anchor": "old",
    "kl_input_clamp": "auto",
    "kl_output_clamp": "auto",
}
"""What takes the KL term out of a preset that has one."""


def renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> Fields:
    """Return those of the peer's parameters that `names` lists, by our names."""
    fields = {ours: given[theirs] for theirs, ours in names.items() if theirs in given}
    if "cliprange_low" in fields:  # a floor below 0 is below every ratio, and so is 0
        fields["cliprange_low"] = min(fields["cliprange_low"], 1.0)
    return fields


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
