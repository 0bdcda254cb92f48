"""NeMo-RL's `ClippedPGLossFn`."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import (
    NO_KL,
    Fields,
    check_selects,
    preset_of,
    rejection,
    renamed,
    scored_rows,
    scored_tokens,
    unit,
    weight,
    without_effect,
)
from tests.golden_data import Case, Exclusion, Params, missing_here

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = without_effect(("reinforce",), ("ratio_clip_min", "ratio_clip_max", "ratio_clip_c"), "a loss without a ratio")
OPTIONS = {"ratio_clip_min": "cliprange_low", "ratio_clip_max": "cliprange_high", "ratio_clip_c": "clip_ratio_c"}
KL = {
    "reference_policy_kl_penalty": "kl_loss_coef",
    "reference_policy_kl_type": "kl_loss_type",
    "kl_input_clamp_value": "kl_input_clamp",
    "kl_output_clamp_value": "kl_output_clamp",
}
FREE = {"max_log_ratio": None}
EPSILON = 1e-8
"""Every denominator has this added: the tokens of a row, and the tokens or rows of the step."""


def translate(case: Case) -> Run:
    given = case.params
    is_per_token = given.get("token_level_loss", case.entry != "gspo")
    loss: Fields = {"aggregation": {"name": "token_mean" if is_per_token else "seq_mean_token_mean"}}
    loss |= {"correction": corrections(given), **kl(given)}
    loss |= renamed(given, {"positive_example_nll_weight": "positive_nll_coef"})
    check_selects(case, "use_cispo", *((True,) if case.entry == "cispo" else (None, False)))
    check_selects(case, "disable_ppo_ratio", *((True,) if case.entry == "reinforce" else (None, False)))
    policy_loss = {} if case.entry == "reinforce" else renamed(given, OPTIONS)
    if case.entry in ("ppo", "ppo+kl", "ppo+tis", "on_policy_forced"):
        policy_loss["anchor"] = "self" if given.get("force_on_policy_ratio") else "old"
    # What the call says of the whole step is the divisor; a file that does not say it counts its own.
    step = given.over({"global_valid_toks": scored_tokens(case), "global_valid_seqs": scored_rows(case)})
    tokens, rows = step["global_valid_toks"], step["global_valid_seqs"]
    count, divisor = (scored_tokens(case), tokens) if is_per_token else (scored_rows(case), rows)
    return Run(
        preset=preset_of(case),
        policy_loss=policy_loss,
        loss=loss,
        row_epsilon=0.0 if is_per_token else EPSILON,
        ratio_epsilon=EPSILON if given.get("sequence_level_importance_ratios") else 0.0,
        scale=count / (divisor + EPSILON),
    )


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if case.params.get("positive_example_nll_weight") and case.inputs["advantages_seq"] is None:
        return missing_here("a sequence is positive by its reward there, a token by its own advantage here")
    return None


def kl(given: Params) -> Fields:
    fields, is_in_reward = {"use_kl_loss": True, **renamed(given, KL)}, given.get("use_kl_in_reward")
    approximates = given.get("use_on_policy_kl_approximation")
    if not given.get("reference_policy_kl_penalty") or is_in_reward:
        return NO_KL
    if approximates:
        fields |= {"kl_gradient": "is_corrected", "kl_anchor": "rollout"}
    return fields


def corrections(given: Params) -> list[Fields]:
    own = {**unit("product" if given.get("sequence_level_importance_ratios") else "token"), **FREE}
    name = given.get("truncated_importance_sampling_type")
    high, low = (given.get(f"truncated_importance_sampling_ratio{end}") for end in ("", "_min"))
    if not given.get("use_importance_sampling_correction"):
        return []
    if name is None or high is None:
        return [weight(None, None, **own)]
    if name == "tis":
        return [weight(low or 0.0, high, **own)]
    level = own if name == "icepop" else {**unit("geometric"), **FREE}
    return [weight(None, None, **own), rejection(low, high, **level)]
