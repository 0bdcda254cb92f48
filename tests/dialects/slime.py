"""slime's policy losses, and how its `policy_loss_function` puts them together."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import Fields, check_selects, preset_of, rejection, renamed, scored_rows, weight
from tests.golden_data import Case, Exclusion, Params

EXCLUDED: dict[str, Exclusion] = {}
OPTIONS = {"eps_clip": "cliprange_low", "eps_clip_high": "cliprange_high", "eps_clip_c": "clip_ratio_c"}
FREE = {"max_log_ratio": None}
ESTIMATORS = {"gspo": ("gspo",), "cispo": ("cispo",)}
"""``estimator`` of an entry; the others take the ratio of tokens, whatever their advantages are."""
PPO = (None, "grpo", "ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")


def translate(case: Case) -> Run:
    given = case.params
    policy_loss = renamed(given, OPTIONS)
    if given.get("eps_clip_high") is None and "eps_clip" in given:
        policy_loss["cliprange_high"] = given["eps_clip"]
    check_selects(case, "estimator", *ESTIMATORS.get(case.entry, PPO))
    loss: Fields = {"correction": corrections(given), **kl(given)}
    # slime leaves the division to its back-end: it sums over samples, or over tokens.
    scale = float(scored_rows(case))
    if given.get("calculate_per_token_loss"):
        loss["aggregation"], scale = {"name": "token_sum"}, 1.0
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, scale=scale)


def kl(given: Params) -> Fields:
    name, coefficient = given.get("kl_loss_type", "k1"), given.get("kl_loss_coef", 0.0)
    gradient = "is_corrected" if given.get("use_unbiased_kl") else "as_is"
    if not given.get("use_kl_loss"):
        return {}
    fields = {"use_kl_loss": True, "kl_loss_type": name, "kl_loss_coef": coefficient, "kl_gradient": gradient}
    return {**fields, "kl_input_clamp": None, "kl_output_clamp": 10.0 if name == "low_var_kl" else None}


def corrections(given: Params) -> list[Fields]:
    found = []
    low, high = given.get("tis_clip_low", 0.0), given.get("tis_clip", 2.0)
    if given.get("tis") == "tis":
        found.append(weight(low, high, **FREE))
    elif given.get("tis") == "icepop":
        found += [weight(None, None, **FREE), rejection(low, high, **FREE)]
    if "opsm_delta" in given:
        own = {"statistic": "k1", "granularity": "sequence", "reduction": "mean", "advantages": "negative"}
        found.append(rejection(None, given["opsm_delta"], between="current_old", **own, **FREE))
    return found
