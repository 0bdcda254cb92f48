"""XTuner: the names of its options are ours; its weights of micro-batches are float32."""

from __future__ import annotations

import math
from typing import Any

from tests.dialects import Run
from tests.dialects.parts import NO_KL, preset_of
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
WEIGHT = {"granularity": "token", "statistic": "ratio", "action": "clamp_upper", "upper": 2.0}
FIELDS = (
    "kl_loss_coef",
    "kl_loss_type",
    "positive_loss_factor",
    "pos_sft_loss_weight",
    "pos_policy_loss_weight",
    "negative_loss_factor",
)
OPTIONS = ("cliprange_low", "cliprange_high", "clip_ratio_c")


def reason_to_exclude(case: Case) -> str | None:
    """What depends on the input."""
    if case.entry == "oreal_loss_context" and math.isnan(float(case.outputs["loss"])):
        return "XTuner multiplies 0 by inf where no token has an advantage of this sign; here that part is 0"
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    loss: dict[str, Any] = {name: given[name] for name in FIELDS if name in given}
    if loss.get("kl_loss_type", "k3") not in ("k3", "low_var_kl"):
        loss |= {"kl_input_clamp": None, "kl_output_clamp": None}
    if not given.get("use_kl_loss", True):
        loss = dict(NO_KL)
    if given.get("_is"):
        loss["correction"] = [WEIGHT]
    if "log_prob_diff_min" in given or "log_prob_diff_max" in given:
        loss["log_ratio_range"] = (given.get("log_prob_diff_min", -20.0), given.get("log_prob_diff_max", 20.0))
    policy_loss = {name: given[name] for name in OPTIONS if name in given}
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss)
