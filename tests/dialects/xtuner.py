"""XTuner: the names of its options are ours; its weights of micro-batches are float32."""

from __future__ import annotations

import math
from typing import Any

from tests.dialects import Run
from tests.dialects.parts import NO_KL, preset_of
from tests.golden_data import Case, Exclusion, peers_error

EXCLUDED: dict[str, Exclusion] = {}
WEIGHT = {"granularity": "token", "statistic": "ratio", "action": "clamp_upper", "upper": 2.0}
FIELDS = (
    "positive_loss_factor",
    "pos_sft_loss_weight",
    "pos_policy_loss_weight",
    "negative_loss_factor",
)
OPTIONS = ("cliprange_low", "cliprange_high", "clip_ratio_c")


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the input."""
    if case.entry == "oreal_loss_context" and math.isnan(float(case.outputs["loss"])):
        return peers_error("XTuner multiplies 0 by inf where no token has an advantage of this sign; that part is 0")
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    loss: dict[str, Any] = {name: given[name] for name in FIELDS if name in given}
    # Both contexts have the term, and without this it is off, whatever its coefficient and type.
    term = {name: given[name] for name in ("kl_loss_coef", "kl_loss_type") if name in given}
    if given.get("use_kl_loss", False):
        is_clamped = term.get("kl_loss_type") in ("k3", "low_var_kl")
        clamps = {"kl_input_clamp": 20.0 if is_clamped else None, "kl_output_clamp": 10.0 if is_clamped else None}
        loss |= {"use_kl_loss": True, **term, **clamps}
    else:
        loss |= NO_KL
    if given.get("_is"):
        loss["correction"] = [WEIGHT]
    if "log_prob_diff_min" in given or "log_prob_diff_max" in given:
        loss["log_ratio_range"] = (given.get("log_prob_diff_min", -20.0), given.get("log_prob_diff_max", 20.0))
    policy_loss = {name: given[name] for name in OPTIONS if name in given}
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss)
