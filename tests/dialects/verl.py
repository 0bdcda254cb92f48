"""verl: ``clip_ratio`` is both sides unless one of its own is given; ``_is`` asks for its rollout weights."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import count_scale, preset_of, scored_rows, scored_tokens, without_effect
from tests.golden_data import Case, Exclusion, missing_here, not_repeatable

EXCLUDED: dict[str, Exclusion] = {}
AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_sum",
    "seq-mean-token-sum": "seq_mean_token_sum",
    "seq-mean-token-mean": "seq_mean_token_mean",
    "seq-mean-token-sum-norm": "constant",
}
EPSILON = 1e-8
"""What verl adds to the length of a row."""
FIXED_AGGREGATION = dict.fromkeys(("gspo", "sapo", "geo_mean"), "seq-mean-token-mean")
"""Losses that ignore ``loss_agg_mode``."""
RANGES = {"dppo_tv": ("threshold_low", "threshold_high"), "dppo_kl": ("threshold_low", "threshold_high")}
OPTIONS = {
    "clip_ratio_c": "clip_ratio_c",
    "tau_pos": "tau_pos",
    "tau_neg": "tau_neg",
    "dro_beta": "tau",
    "clip_cov_ratio": "clip_cov_ratio",
    "clip_cov_lb": "cov_low",
    "clip_cov_ub": "cov_high",
    "kl_cov_ratio": "kl_cov_ratio",
    "ppo_kl_coef": "kl_coef",
}
NO_RANGE = ("sapo", "gpg", "kl_cov", "dro", "reinforce")
COUNTS = ("dp_size", "batch_num_tokens", "global_batch_size")
IGNORED = {
    **without_effect(FIXED_AGGREGATION, ("loss_agg_mode",), "always seq-mean-token-mean"),
    **without_effect(("geo_mean",), COUNTS, "a mean over the rows of the call, whatever the step"),
    **without_effect(NO_RANGE, ("clip_ratio", "clip_ratio_low", "clip_ratio_high"), "a loss without a range"),
    "loss_scale_factor": "only seq-mean-token-sum-norm divides by it",
}
WEIGHT = {"granularity": "token", "statistic": "ratio", "action": "clamp_upper", "upper": 2.0}


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if case.entry == "clip_cov" and case.params.get("clip_cov_ratio", 0.0) < 1:
        return not_repeatable(
            "the draw is the global torch.randperm's: only a ratio of 1, all eligible tokens, repeats"
        )
    if case.entry == "geo_mean" and case.params.get("_is"):
        return missing_here(
            "verl caps the weight of a token, then takes the geometric mean of a row's: two steps, not one"
        )
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given, entry = case.params, case.entry
    policy_loss = {ours: given[theirs] for theirs, ours in OPTIONS.items() if theirs in given}
    names = RANGES.get(entry, ("cliprange_low", "cliprange_high"))
    for name, side in zip(names, ("low", "high"), strict=True):
        value = None if entry in NO_RANGE else given.get(f"clip_ratio_{side}", given.get("clip_ratio"))
        if value is not None:
            # A floor of 1 - 10 is below every ratio, and so is 0.
            policy_loss[name] = min(value, 1.0) if name == "cliprange_low" and entry != "geo_mean" else value
    if entry == "geo_mean":
        # verl's epsilon shrinks the bounds of clipped tokens, too; the bounds are the same for all rows, so on average.
        rows = case.inputs["response_mask"].sum(-1)
        shrink = 1 - EPSILON * float((1 / rows[rows > 0]).mean())
        policy_loss |= {name: policy_loss.get(name, 0.2) * shrink for name in names}
    loss: dict[str, Any] = {}
    if "loss_agg_mode" in given and entry not in FIXED_AGGREGATION:
        loss["aggregation"] = {"name": AGGREGATIONS[given["loss_agg_mode"]]}
        if given["loss_agg_mode"] == "seq-mean-token-sum-norm":
            # Without loss_scale_factor verl divides by the padded width.
            width = case.inputs["response_mask"].shape[1]
            loss["aggregation"]["length"] = float(given.get("loss_scale_factor") or width)
    between = "current_rollout" if entry == "reinforce" else "old_rollout"
    loss["correction"] = [{**WEIGHT, "between": between}] if given.get("_is") else None
    mode = FIXED_AGGREGATION.get(entry) or given.get("loss_agg_mode", "token-mean")
    is_per_token, scale = mode == "token-mean", 1.0
    if entry != "geo_mean":
        scale = count_scale(case, scored_rows(case), scored_tokens(case), is_per_token=is_per_token)
    if mode == "token-sum":
        scale = float(given.get("dp_size", 1))
    return Run(
        preset=preset_of(case),
        policy_loss=policy_loss,
        loss=loss,
        row_epsilon=EPSILON if mode == "seq-mean-token-mean" else 0.0,
        ratio_epsilon=EPSILON if entry == "geo_mean" else 0.0,
        scale=scale,
    )
