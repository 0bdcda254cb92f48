"""NeMo-RL's `ClippedPGLossFn`."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import NO_KL, Fields, preset_of, rejection, renamed, scored_rows, scored_tokens, unit, weight
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
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
    policy_loss = {} if given.get("disable_ppo_ratio") else renamed(given, OPTIONS)
    count = scored_tokens(case) if is_per_token else scored_rows(case)
    return Run(
        preset=preset_of(case),
        policy_loss=policy_loss,
        loss=loss,
        row_epsilon=0.0 if is_per_token else EPSILON,
        ratio_epsilon=EPSILON if given.get("sequence_level_importance_ratios") else 0.0,
        scale=count / (count + EPSILON),
    )


def reason_to_exclude(case: Case) -> str | None:
    """What depends on the parameters."""
    if case.params.get("positive_example_nll_weight") and case.inputs["advantages_seq"] is None:
        return "a sequence is positive by its reward there (the file: by its first advantage), a token by its own here"
    return None


def kl(given: dict[str, Any]) -> Fields:
    if not given.get("reference_policy_kl_penalty"):
        return NO_KL
    fields = {"use_kl_loss": True, **renamed(given, KL)}
    if given.get("use_on_policy_kl_approximation"):
        fields |= {"kl_gradient": "is_corrected", "kl_anchor": "rollout"}
    return fields


def corrections(given: dict[str, Any]) -> list[Fields]:
    if not given.get("use_importance_sampling_correction"):
        return []
    own = {**unit("product" if given.get("sequence_level_importance_ratios") else "token"), **FREE}
    name = given.get("truncated_importance_sampling_type")
    high, low = (given.get(f"truncated_importance_sampling_ratio{end}") for end in ("", "_min"))
    if name is None or high is None:
        return [weight(None, None, **own)]
    if name == "tis":
        return [weight(low or 0.0, high, **own)]
    level = own if name == "icepop" else {**unit("geometric"), **FREE}
    return [weight(None, None, **own), rejection(low, high, **level)]
