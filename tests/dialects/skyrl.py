"""SkyRL's policy losses: it scales advantages by the weights of a reduction and sums."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import (
    Fields,
    check_selects,
    preset_of,
    rejection,
    renamed,
    scored_tokens,
    unit,
    weight,
    without_effect,
)
from tests.golden_data import Case, Exclusion, Params, missing_here, not_repeatable

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = without_effect(("cross_entropy",), ("loss_reduction",), "it scales advantages, which this loss does not read")
OPTIONS = {
    "eps_clip_low": "cliprange_low",
    "eps_clip_high": "cliprange_high",
    "clip_ratio_c": "clip_ratio_c",
    "tau_pos": "tau_pos",
    "tau_neg": "tau_neg",
    "cispo_anchor": "anchor",
    "cispo_eps_clip_low": "cliprange_low",
    "cispo_eps_clip_high": "cliprange_high",
    "delta_low": "threshold_low",
    "delta_high": "threshold_high",
    "clip_cov_ratio": "clip_cov_ratio",
    "clip_cov_lb": "cov_low",
    "clip_cov_ub": "cov_high",
    "kl_cov_frac": "kl_cov_ratio",
    "ppo_kl_coef": "kl_coef",
}
AGGREGATIONS: dict[str, Fields] = {
    "token_mean": {"name": "token_mean"},
    "sequence_mean": {"name": "seq_mean_token_mean", "count_empty": True},
    "seq_mean_token_sum_norm": {"name": "constant", "length": 16, "count_empty": True},
    "prompt_mean": {"name": "prompt_mean", "count_empty": True},
    # The mean over micro-batches of their token means: that over prompts whose rows are those of a micro-batch.
    "token_mean_legacy": {"name": "prompt_mean", "count_empty": True},
}
TOKEN_MASKS = (
    "outlier_token_is_threshold_low",
    "outlier_token_is_threshold_high",
    "token_mask_is_threshold_low",
    "token_mask_is_threshold_high",
)
ROWS_PER_PROMPT = 2
"""The file's convention: of a prompt, and of a micro-batch."""


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if case.entry == "clip_cov" and case.params.get("clip_cov_ratio", 0.0) < 1:
        return not_repeatable(
            "the draw is the global torch.randperm's: only a ratio of 1, all eligible tokens, repeats"
        )
    given = case.params.get("off_policy_correction") or Params({})
    masks_tokens = any(given.get(name) is not None for name in TOKEN_MASKS)
    if masks_tokens and (given.get("sequence_mask_metric") or given.get("tis_ratio_type") == "sequence"):
        return missing_here("the sequence's statistic skips tokens that another mask rejected; here no order matters")
    return None


def translate(case: Case) -> Run:
    given = case.params
    policy_loss, preset = renamed(given, OPTIONS), preset_of(case)
    name = case.entry.split("+")[0].removesuffix("_prompt_mean")
    check_selects(case, "policy_loss_type", *((name,) if name == "dual_clip" else (None, name)))
    if given.get("dppo_type") == "binary_kl":
        policy_loss["loss_type"] = "dppo_kl"
    if case.entry == "clip_cov":  # its covariance is that of A / N: the bounds are N times as large for that of A
        bounds = {"cov_low": 1.0, "cov_high": 5.0} | policy_loss
        policy_loss |= {name: bounds[name] * scored_tokens(case) for name in ("cov_low", "cov_high")}
    if case.entry == "kl_cov":  # its penalty is a sum beside a mean over N
        policy_loss["kl_coef"] = policy_loss.get("kl_coef", 1.0) * scored_tokens(case)
    loss: Fields = {}
    if case.entry != "cross_entropy" and "loss_reduction" in given:
        loss["aggregation"] = AGGREGATIONS[given["loss_reduction"]]
    if "off_policy_correction" in given:
        loss["correction"] = corrections(given["off_policy_correction"])
    groups = [row // ROWS_PER_PROMPT for row in range(len(case.inputs["response_mask"]))]
    is_rescaled = case.entry in ("clip_cov", "kl_cov")
    return Run(preset=preset, policy_loss=policy_loss, loss=loss, groups=groups, is_rescaled=is_rescaled)


def corrections(given: Params) -> list[Fields]:
    found = []
    if level := given.get("tis_ratio_type"):
        usual = {"token": 2.0, "sequence": 5.0}[level]
        upper = given.get(f"{level}_tis_ratio_clip_high", usual)
        found.append(weight(None, upper, **unit("token" if level == "token" else "product")))
    if metric := given.get("sequence_mask_metric"):
        name, low, high = {"geometric": ("geo", 0.99, 1.01), "product": ("product", 0.5, 2.0)}[metric]
        low, high = given.get(f"{name}_mask_low", low), given.get(f"{name}_mask_high", high)
        found.append(rejection(low, high, **unit(metric)))
    for name, action in (("outlier_token_is_threshold", "veto"), ("token_mask_is_threshold", "mask")):
        low, high = given.get(f"{name}_low"), given.get(f"{name}_high")
        if (low, high) != (None, None):
            found.append(rejection(low, high) | {"action": action})
    return found
