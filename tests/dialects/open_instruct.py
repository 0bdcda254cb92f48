"""open-instruct's `compute_grpo_loss` with the weights of `compute_rho_correction`."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import (
    NO_KL,
    Fields,
    check_selects,
    preset_of,
    rejection,
    renamed,
    unit,
    weight,
    without_effect,
)
from tests.golden_data import Case, Exclusion, Params

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = without_effect(("cispo",), ("clip_lower",), "its CISPO has a ceiling and no floor")
ESTIMATORS = ("k1", "k2", "k3", "k1")
BOUND = {"max_token_log_ratio": 10.0}


def translate(case: Case) -> Run:
    given = case.params
    is_cispo = case.entry == "cispo"
    check_selects(case, "loss_fn", *(("cispo",) if is_cispo else (None, "dapo")))
    names = {"clip_higher": "cliprange_high"} | ({} if is_cispo else {"clip_lower": "cliprange_low"})
    loss: Fields = {"correction": corrections(given), **kl(given)}
    return Run(preset=preset_of(case), policy_loss=renamed(given, names), loss=loss)


def kl(given: Params) -> Fields:
    number, coefficient = given.get("kl_estimator", 2), renamed(given, {"beta": "kl_loss_coef"})
    if not given.get("load_ref_policy", True):
        return NO_KL
    # Its estimator 3 is the ratio times k1.
    gradient = "is_corrected" if number == 3 else "as_is"
    own = {"use_kl_loss": True, "kl_loss_type": ESTIMATORS[number], "kl_gradient": gradient}
    return {**own, "kl_input_clamp": 40.0, "kl_output_clamp": None, **coefficient}


def corrections(given: Params) -> list[Fields]:
    is_variation = given.get("rho_mask_tv_divergence")
    own = {**unit("geometric" if given.get("rho_mask_sequence_level") else "token"), **BOUND}

    def bounds(kind: str, upper: float) -> tuple[float | None, float | None]:
        return given.get(f"rho_{kind}_lower_bound") or None, given.get(f"rho_{kind}_upper_bound", upper) or None

    found = [weight(*bounds("clamp", 2.0), **own)]
    low, high = bounds("mask", 0.0)
    if not given.get("use_rho_correction", True):
        return []
    if (low, high) != (None, None):
        if is_variation:
            own = {**unit("geometric"), **BOUND, "statistic": "ratio_tv", "advantages": "widening"}
        found.append(rejection(low, high, **own))
    return found
