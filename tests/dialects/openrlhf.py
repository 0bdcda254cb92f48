"""OpenRLHF's `PolicyLoss`."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import (
    Fields,
    count_scale,
    preset_of,
    rejection,
    renamed,
    scored_rows,
    scored_tokens,
    unit,
    weight,
    without_effect,
)
from tests.golden_data import Case, Exclusion, Params

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = {
    **without_effect(("gspo",), ("token_level_loss",), "its GSPO always averages over sequences"),
    **without_effect(
        ("gspo",),
        ("vllm_is_truncated_threshold", "vllm_is_correction_type"),
        "its GSPO takes the sampler as anchor instead of a weight",
    ),
}
OPTIONS = {"clip_eps_low": "cliprange_low", "clip_eps_high": "cliprange_high", "dual_clip": "clip_ratio_c"}
FREE = {"max_log_ratio": None}
EPSILON = 1e-8
"""Its mean over the tokens of a row divides by their number and this."""


def translate(case: Case) -> Run:
    given = case.params.over({"policy_loss_type": "ppo", "token_level_loss": True})
    is_corrected, is_gspo = given.get("enable_vllm_is_correction", False), given["policy_loss_type"] == "gspo"
    is_per_token = not is_gspo and given["token_level_loss"]
    policy_loss, loss = renamed(given, OPTIONS), {}
    if is_gspo:  # always the mean over sequences; corrected by its anchor
        policy_loss["anchor"] = "rollout" if is_corrected else "old"
    else:
        loss["aggregation"] = {"name": "token_mean" if is_per_token else "seq_mean_token_mean"}
        weights = corrections(given)
        loss["correction"] = weights if is_corrected else []
    scale = count_scale(case, scored_rows(case), scored_tokens(case), is_per_token=is_per_token)
    epsilon = 0.0 if is_per_token else EPSILON
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, row_epsilon=epsilon, scale=scale)


def corrections(given: Params) -> list[Fields]:
    low, high = given.get("vllm_is_truncated_threshold", (0.5, 5.0))
    name = given.get("vllm_is_correction_type", "tis")
    if name == "tis":
        return [weight(low, high, **FREE)]
    level = {"icepop": "token", "seq-mask-tis": "geometric"}[name]
    return [weight(None, None, **FREE), rejection(low, high, **unit(level), **FREE)]
