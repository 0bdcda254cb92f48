"""TRL: ``loss_type`` picks the loss or only the mean, ``_is`` is the mode of its correction (at most 3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from tests.dialects import Run
from tests.dialects.parts import check_selects, preset_of, without_effect
from tests.golden_data import Case, Exclusion, Params, missing_here, peers_error

EXCLUDED: dict[str, Exclusion] = {}
DEFAULT_LENGTH = 16
"""``max_completion_length`` where a case does not give it."""
SINGLE = ("tau_pos", "tau_neg", "k_pos", "lambda_pos", "k_neg", "lambda_neg")
"""Options that TRL takes through ``torch.where`` of two numbers, which makes them float32."""
LARGEST_WEIGHT = 3.0
PER_TOKEN = ("dapo", "cispo", "vespo")
"""Loss types that divide by the tokens of the step."""
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "grpo": {"name": "seq_mean_token_mean", "count_empty": True},
    "sapo": {"name": "seq_mean_token_mean", "count_empty": True},
    "luspo": {"name": "seq_mean_token_sum", "count_empty": True},
    "dr_grpo": {"name": "constant", "count_empty": True},
    **{name: {"name": "token_mean"} for name in ("bnpo", *PER_TOKEN)},
}
LEVELS = {"gspo": "sequence", "luspo": "sequence", "gspo_token": "sequence_token"}
"""``importance_sampling_level`` of an entry; "token" in the others."""
OPTIONS = {
    "delta": "delta",
    "sapo_temperature_pos": "tau_pos",
    "sapo_temperature_neg": "tau_neg",
    **{f"vespo_{name}": name for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg")},
}


def lengths_without_effect(entries: Iterable[str]) -> dict[str, str]:
    """Return the part of an ``IGNORED`` about the longest completion."""
    return without_effect(entries, ("max_completion_length",), "only loss_type dr_grpo divides by it")


def counts_without_effect(entries: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return the part of an ``IGNORED`` about counts of tokens of a step."""
    return without_effect(entries, names, "only loss types dapo, cispo and vespo divide by the tokens of a step")


PER_ROW = ("grpo", "bnpo", "dr_grpo", "sapo", "luspo", "gmpo")
IGNORED = {
    **without_effect(("sapo", "vespo"), ("epsilon", "epsilon_low", "epsilon_high"), "a loss without a range"),
    **lengths_without_effect(("grpo", "bnpo", "dapo", "cispo", "sapo", "vespo", "gspo", "gspo_token", "luspo", "gmpo")),
    **counts_without_effect(PER_ROW, ("num_items_in_batch", "steps_per_generation")),
}


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if "top_entropy_quantile" in case.params:
        return missing_here("the policy term of low-entropy tokens left out: a quantile that no setting here has")
    if case.entry == "vespo" and case.params.get("_is", "token_truncate") != "token_truncate":
        return peers_error(
            "TRL takes the log of a rejected weight of 0 as log 1e-8 inside VESPO's weight; here it is 0"
        )
    if case.entry == "gspo_token" and case.params.get("beta") and case.params.get("use_bias_correction_kl"):
        return missing_here("a KL term times the sequence's ratio in value alone, with the gradient of each token")
    has_empty_row = bool((case.inputs["response_mask"] == 0).all(-1).any())
    if case.entry == "gmpo" and has_empty_row:
        return peers_error(
            "TRL's GMPO adds minus the advantage of a row without a scored token, as if its ratio were 1"
        )
    return None


def check_level(case: Case) -> None:
    """Read the level of the ratio, which the preset of the entry stands for."""
    check_selects(
        case, "importance_sampling_level", *((LEVELS[case.entry],) if case.entry in LEVELS else (None, "token"))
    )


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    check_level(case)
    policy_loss = {ours: given[theirs] for theirs, ours in OPTIONS.items() if given.get(theirs) is not None}
    if case.entry == "sapo":
        policy_loss = {"tau_neg": 1.05} | policy_loss  # its default is no float32 either
    policy_loss = {name: single(value) if name in SINGLE else value for name, value in policy_loss.items()}
    policy_loss |= clip_range(case)
    loss: dict[str, Any] = kl_of(given)
    if "loss_type" in given:
        loss["aggregation"] = aggregation_of(given)
    if threshold := given.get("off_policy_mask_threshold"):
        loss["correction"] = [opsm(threshold)]
    if case.entry == "vespo" and "_is" in given:
        policy_loss |= {"use_rollout_weight": True, "rollout_weight_max": LARGEST_WEIGHT}
    elif "_is" in given:
        loss["correction"] = [*loss.get("correction", []), *corrections_of(given["_is"])]
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, scale=scale_of(case))


def single(value: float) -> float:
    """Return `value` as float32 holds it."""
    return float(torch.tensor(value, dtype=torch.float32))


def clip_range(case: Case) -> dict[str, float]:
    """Return the range of a case; ``epsilon_high`` is the ceiling itself in CISPO, and ``epsilon`` where not given."""
    if case.entry in ("sapo", "vespo"):
        return {}
    low = case.params.get("epsilon", case.params.get("epsilon_low"))
    high = case.params.get("epsilon_high", low)
    if case.entry == "cispo":
        return {} if high is None else {"weight_max": high}
    names = {"cliprange_low": low, "cliprange_high": high}
    return {name: value for name, value in names.items() if value is not None}


def kl_of(given: Params) -> dict[str, Any]:
    """Return the KL term of ``beta``: k3 without clamps, in the loss and never under a correction."""
    gradient = "is_corrected" if given.get("use_bias_correction_kl") else "as_is"
    if not given.get("beta"):
        return {}
    clamps = {"kl_input_clamp": None, "kl_output_clamp": None}
    is_wide = gradient == "is_corrected" and given.get("importance_sampling_level", "token") != "token"
    return {
        "use_kl_loss": True,
        "kl_loss_type": "k3",
        "kl_loss_coef": given["beta"],
        "kl_gradient": gradient,
        "kl_ratio_level": "sequence" if is_wide else "token",
        **clamps,
    }


def aggregation_of(given: Params, name: str | None = None) -> dict[str, Any]:
    """Return how a ``loss_type`` averages."""
    chosen = AGGREGATIONS[name or given["loss_type"]]
    if chosen["name"] != "constant":
        return chosen
    return chosen | {"length": float(given.get("max_completion_length", DEFAULT_LENGTH))}


def opsm(threshold: float) -> dict[str, Any]:
    """Return the mask of sequences with A < 0 whose mean log(rollout / current) is above the threshold."""
    measured = {"granularity": "sequence", "statistic": "k1", "reduction": "mean", "between": "current_rollout"}
    result = {"action": "mask", "upper": threshold, "advantages": "negative", "denominator": "original"}
    return {**measured, **result, "max_log_ratio": None}


def corrections_of(mode: str) -> list[dict[str, Any]]:
    """Return the corrections of ``{token,seq}_{truncate,mask}``: the product over a sequence, one factor for all."""
    level, action = mode.split("_")
    unit: dict[str, Any] = {"max_log_ratio": None}
    if level != "token":
        unit |= {"granularity": "sequence", "reduction": "sum"}
    if action == "truncate":
        return [{"action": "clamp_upper", "upper": LARGEST_WEIGHT, **unit}]
    rejection = {"action": "mask", "upper": LARGEST_WEIGHT, "denominator": "original", **unit}
    return [{"action": "clamp_upper", **unit}, rejection]


def scale_of(case: Case) -> float:
    """Return what TRL's number is in ours: its share of a whole accumulation window, where ours is a whole step."""
    given = case.params
    steps = given.get("current_gradient_accumulation_steps", 1)
    if given.get("loss_type") not in PER_TOKEN:
        return 1 / steps  # each micro-batch divides its own mean by their number
    # num_items_in_batch counts the tokens of all micro-batches, of which the case is one.
    tokens = float((case.inputs["response_mask"] != 0).sum())
    items = max(given.get("num_items_in_batch", tokens), 1.0)
    return tokens / items * given.get("steps_per_generation", steps) / steps
