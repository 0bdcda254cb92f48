"""Facts about a policy loss besides its formula, and phrases that several losses share; no torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """Facts that a formula does not show. `ratio`, `gradient` and `bound` are filled in with options like a formula."""

    ratio: str = ""
    """Whether the ratio is clipped, a weight, or absent."""
    gradient: str = ""
    """Where the gradient is 0 and what it is elsewhere."""
    bound: str = "{ratios}; the gradient is 0 outside"
    """Effect of the bounds of the log ratio; empty without a ratio. ``{ratios}`` says between which nats log
    ratios are clamped, ``{range}`` names the nats alone."""
    source: str = ""
    """Paper with its equation, or the project that it comes from."""
    differs: str = ""
    """Where the code differs from its source, and caveats; the clamp of log ratios is in `bound`."""


NO_FACTS = LossFacts()
WEIGHT_BOUND = "the weight is computed from log ratios held in {range}; this takes no gradient from log pi"
CLIPPED = "r is clipped and carries the gradient"
WEIGHT = "r is a weight without gradient"
NO_RATIO = "there is no ratio, so nothing keeps the policy near the old one"
SEQUENCE = "one per sequence, is clipped and carries the gradient"
BINDS = "0 where the clip binds (above the range with A > 0, below it with A < 0, beyond a dual clip with A < 0)"
