"""slime's policy losses, and how its `policy_loss_function` puts them together."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import Fields, preset_of, rejection, renamed, scored_rows, weight
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
OPTIONS = {"eps_clip": "cliprange_low", "eps_clip_high": "cliprange_high", "eps_clip_c": "clip_ratio_c"}
FREE = {"max_log_ratio": None}


def translate(case: Case) -> Run:
    given = case.params
    policy_loss = renamed(given, OPTIONS)
    if given.get("eps_clip_high") is None and "eps_clip" in given:
        policy_loss["cliprange_high"] = given["eps_clip"]
    loss: Fields = {"correction": corrections(given)}
    # slime leaves the division to its back-end: it sums over samples, or over tokens.
    scale = float(scored_rows(case))
    if given.get("calculate_per_token_loss"):
        loss["aggregation"], scale = {"name": "token_sum"}, 1.0
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, scale=scale)


def corrections(given: dict[str, Any]) -> list[Fields]:
    found = []
    low, high = given.get("tis_clip_low", 0.0), given.get("tis_clip", 2.0)
    if given.get("tis") == "tis":
        found.append(weight(low, high, **FREE))
    elif given.get("tis") == "icepop":
        found += [weight(None, None, **FREE), rejection(low, high, **FREE)]
    if "opsm_delta" in given:
        own = {"statistic": "k1", "granularity": "sequence", "reduction": "mean", "advantages": "negative"}
        found.append(rejection(None, given["opsm_delta"], between="current_old", **own, **FREE))
    return found
