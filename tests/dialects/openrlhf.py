"""OpenRLHF's `PolicyLoss`."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run
from tests.dialects.parts import Fields, preset_of, rejection, renamed, unit, weight
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
OPTIONS = {"clip_eps_low": "cliprange_low", "clip_eps_high": "cliprange_high", "dual_clip": "clip_ratio_c"}
FREE = {"max_log_ratio": None}
EPSILON = 1e-8
"""Its mean over the tokens of a row divides by their number and this."""


def translate(case: Case) -> Run:
    given = {"policy_loss_type": "ppo", "token_level_loss": True} | case.params
    is_corrected, is_gspo = given.get("enable_vllm_is_correction", False), given["policy_loss_type"] == "gspo"
    policy_loss, loss = renamed(given, OPTIONS), {}
    if is_gspo:  # always the mean over sequences; corrected by its anchor
        policy_loss["anchor"] = "rollout" if is_corrected else "old"
    else:
        loss["aggregation"] = {"name": "token_mean" if given["token_level_loss"] else "seq_mean_token_mean"}
        loss["correction"] = corrections(given) if is_corrected else []
    epsilon = 0.0 if given["token_level_loss"] and not is_gspo else EPSILON
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, row_epsilon=epsilon)


def corrections(given: dict[str, Any]) -> list[Fields]:
    low, high = given.get("vllm_is_truncated_threshold", (0.5, 5.0))
    name = given.get("vllm_is_correction_type", "tis")
    if name == "tis":
        return [weight(low, high, **FREE)]
    level = {"icepop": "token", "seq-mask-tis": "geometric"}[name]
    return [weight(None, None, **FREE), rejection(low, high, **unit(level), **FREE)]
