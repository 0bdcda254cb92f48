"""ms-swift: TRL's names, k3 with clamps, and corrections that multiply the KL term, too."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run, trl
from tests.dialects.parts import check_selects, preset_of
from tests.golden_data import Case, Exclusion, Params, missing_here

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = trl.lengths_without_effect(
    ("grpo", "bnpo", "dapo", "cispo", "sapo", "gspo", "gspo_token", "fipo", "real", "grpo+seq_is", "grpo+opsm")
)
THRESHOLD = 2.0
"""``rollout_importance_sampling_threshold`` where a case does not give it."""
GENERATIONS = 2
"""Rows of a group, one after the other, for REAL."""
SDAR_MODES = {
    "token-mean": {"name": "token_mean"},
    "seq-mean-token-sum": {"name": "seq_mean_token_sum", "count_empty": True},
    "seq-mean-token-mean": {"name": "seq_mean_token_mean", "count_empty": True},
}
OPTIONS = {
    "delta": "delta",
    "tau_pos": "tau_pos",
    "tau_neg": "tau_neg",
    "fipo_decay_rate": "half_life",
    "fipo_clip_high_only": "only_raise",
    "fipo_clip_range": "weight_range",
    "fipo_safety_threshold": "safety_threshold",
    "real_tau": "tau",
    "gate_beta": "gate_beta",
}


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if "top_entropy_quantile" in case.params:
        return missing_here("the policy term of low-entropy tokens left out: a quantile that no setting here has")
    if case.entry == "real" and case.params.get("beta"):
        return missing_here("ms-swift averages REAL over groups, its KL over tokens; here all terms have one mean")
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    preset = preset_of(case)
    policy_loss = {ours: given[theirs] for theirs, ours in OPTIONS.items() if theirs in given}
    policy_loss |= trl.clip_range(case)
    if case.entry == "sdar":
        aggregation = SDAR_MODES[given.get("loss_agg_mode", "token-mean")]
        fields = {"teacher_logprobs": "ref_log_probs"}
        return Run(preset=preset, policy_loss=policy_loss, loss={"aggregation": aggregation}, fields=fields)
    trl.check_level(case)
    loss: dict[str, Any] = {}
    groups = None
    if case.entry == "real":
        check_selects(case, "loss_type", "real")
        groups = [row // GENERATIONS for row in range(len(case.inputs["seq_lens"]))]
    else:
        loss["aggregation"] = aggregation_of(given)
    threshold = given.get("rollout_importance_sampling_threshold", THRESHOLD)
    if mode := given.get("rollout_importance_sampling_mode"):
        loss["correction"] = corrections_of(mode, threshold)
    if bound := given.get("off_policy_sequence_mask_delta"):
        loss["correction"] = [*loss.get("correction", []), trl.opsm(bound)]
    if given.get("beta") and not given.get("kl_in_reward"):
        # A dropped sequence leaves the mask of the KL term, too.
        loss |= {"use_kl_loss": True, "kl_loss_type": "k3", "kl_loss_coef": given["beta"]}
        loss["correction_on_kl"] = bool(loss.get("correction"))
    return Run(preset=preset, policy_loss=policy_loss, loss=loss, groups=groups)


def aggregation_of(given: Params) -> dict[str, Any]:
    """Return how a ``loss_type`` averages; FIPO as DAPO."""
    name = given.get("loss_type", "grpo")
    return trl.aggregation_of(given, "dapo" if name == "fipo" else name)


def corrections_of(mode: str, threshold: float) -> list[dict[str, Any]]:
    """Return the corrections of a mode: of a sequence the geometric mean, whose mask keeps the tokens' own weights."""
    level, action = mode.split("_")
    bounded = {"max_token_log_ratio": 20.0}
    unit = bounded if level == "token" else {"granularity": "sequence", "reduction": "mean", **bounded}
    if action == "truncate":
        return [{"action": "clamp_upper", "upper": threshold, **unit}]
    rejection = {"action": "mask", "upper": threshold, "denominator": "original", **unit}
    return [{"action": "clamp_upper", **bounded}, rejection]
