"""AReaL: the ratio is to its proximal policy (our old), corrections compare that with the sampler's."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import check_selects, preset_of
from tests.golden_data import Case, Exclusion, Params, missing_here

EXCLUDED: dict[str, Exclusion] = {}
OPTIONS = {"c_clip": "clip_ratio_c", "tau_pos": "tau_pos", "tau_neg": "tau_neg"}


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    rejection = case.params.get("rejection_sampling") or Params({})
    if rejection.get("metric") in ("kl_k1", "kl_k3"):
        return missing_here("AReaL rejects by KL(pi_old || pi_rollout); a correction here measures the other one")
    if rejection.get("metric") == "binary_kl":
        return missing_here("larger of two binary KL divergences: not a statistic here")
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    is_sequence = given.get("importance_sampling_level") == "sequence"
    if case.entry != "sapo":
        check_selects(case, "importance_sampling_level", *(("sequence",) if case.entry == "gspo" else (None, "token")))
    policy_loss: dict[str, Any] = {ours: given[theirs] for theirs, ours in OPTIONS.items() if theirs in given}
    if "eps_clip" in given:
        low, high = given["eps_clip"], given.get("eps_clip_higher")
        policy_loss |= {"cliprange_low": low, "cliprange_high": high or low}
    if case.entry == "sapo" and is_sequence:
        policy_loss["loss_type"] = "sapo_sequence"
    loss: dict[str, Any] = {}
    if rejection := given.get("rejection_sampling"):
        loss["correction"] = corrections_of(rejection)
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss)


def corrections_of(given: Params) -> list[dict[str, Any]]:
    """Return the corrections of ``rejection_sampling``: of a sequence one weight, the geometric mean of its ratios."""
    level, action = given.get("level", "token"), given.get("action", "mask")
    metric, agg = given.get("metric", "ratio"), given.get("agg", "mean")
    lower, upper = given.get("lower"), given.get("upper", 5.0)
    free: dict[str, Any] = {"max_log_ratio": None}
    statistic = metric.removeprefix("kl_")
    per_sequence = {"granularity": "sequence"} if level == "sequence" else {}
    weight = {**per_sequence, "reduction": "mean"} if per_sequence and statistic == "ratio" else {}
    if action == "clamp":
        return [{"action": "clamp", "lower": lower or 0.0, "upper": upper, **weight, **free}]
    measured = {**per_sequence, "reduction": agg} if per_sequence else {}
    bounds = {"statistic": statistic, "lower": lower, "upper": upper, "denominator": "original"}
    return [{"action": "clamp_upper", **weight, **free}, {"action": "mask", **measured, **bounds, **free}]
