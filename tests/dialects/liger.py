"""Liger: TRL's loss types, each with a KL term by default (``beta`` = 0.04)."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run, trl
from tests.dialects.parts import NO_KL, preset_of
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
WEIGHT_MAX = 2.0
"""Cap of the rollout weights where a case gives them."""


def reason_to_exclude(case: Case) -> str | None:
    """What depends on the parameters."""
    if case.params.get("loss_type") == "luspo" and case.params.get("beta"):
        return "with a KL term Liger 0.8.5 averages LUSPO over the padded width (TRL corrected it in 1.16)"
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    policy_loss = {ours: given[theirs] for theirs, ours in trl.OPTIONS.items() if given.get(theirs) is not None}
    if case.entry == "vespo":
        policy_loss = {name: trl.single(value) for name, value in policy_loss.items()}
    policy_loss |= clip_range(case)
    loss: dict[str, Any] = {"aggregation": trl.aggregation_of(given)}
    if "beta" in given:
        loss |= trl.kl_of(given) or NO_KL
    if given.get("_is") and case.entry == "vespo":
        policy_loss |= {"use_rollout_weight": True, "rollout_weight_max": WEIGHT_MAX}
    elif given.get("_is"):
        loss["correction"] = [{"action": "clamp_upper", "upper": WEIGHT_MAX}]
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss)


def clip_range(case: Case) -> dict[str, float]:
    """Return the range of a case; either side is 0.2 where it is not given, and CISPO has a ceiling alone."""
    low, high = (case.params.get(f"epsilon_{side}", 0.2) for side in ("low", "high"))
    if case.entry in ("sapo", "vespo"):
        return {}
    return {"weight_max": high} if case.entry == "cispo" else {"cliprange_low": low, "cliprange_high": high}
