"""AReaL: the ratio is to its proximal policy (our old), corrections compare that with the sampler's."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import preset_of
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
OPTIONS = {"c_clip": "clip_ratio_c", "tau_pos": "tau_pos", "tau_neg": "tau_neg"}


def reason_to_exclude(case: Case) -> str | None:
    """What depends on the parameters."""
    rejection = case.params.get("rejection_sampling") or {}
    if rejection.get("metric") in ("kl_k1", "kl_k3"):
        return "AReaL measures KL(pi_old || pi_rollout) on samples of pi_rollout; our estimators are of the other one"
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    is_sequence = given.get("importance_sampling_level") == "sequence"
    policy_loss: dict[str, Any] = {ours: given[theirs] for theirs, ours in OPTIONS.items() if theirs in given}
    if "eps_clip" in given:
        low = given["eps_clip"]
        policy_loss |= {"cliprange_low": low, "cliprange_high": given.get("eps_clip_higher") or low}
    if case.entry == "sapo" and is_sequence:
        policy_loss["loss_type"] = "sapo_sequence"
    loss: dict[str, Any] = {}
    if rejection := given.get("rejection_sampling"):
        loss["correction"] = corrections_of(**rejection)
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss)


def corrections_of(
    level: str = "token",
    action: str = "mask",
    metric: str = "ratio",
    agg: str = "mean",
    upper: float = 5.0,
    lower: float | None = None,
) -> list[dict[str, Any]]:
    """Return the corrections of ``rejection_sampling``: of a sequence one weight, the geometric mean of its ratios."""
    free: dict[str, Any] = {"max_log_ratio": None}
    statistic = metric.removeprefix("kl_")
    per_sequence = {"granularity": "sequence"} if level == "sequence" else {}
    weight = {**per_sequence, "reduction": "mean"} if per_sequence and statistic == "ratio" else {}
    if action == "clamp":
        return [{"action": "clamp", "lower": lower or 0.0, "upper": upper, **weight, **free}]
    measured = {**per_sequence, "reduction": agg} if per_sequence else {}
    bounds = {"statistic": statistic, "lower": lower, "upper": upper, "denominator": "original"}
    return [{"action": "clamp_upper", **weight, **free}, {"action": "mask", **measured, **bounds, **free}]
