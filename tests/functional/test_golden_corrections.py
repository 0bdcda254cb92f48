"""Weights and rejections that other projects' own code computed, and ours from the same inputs.

A translator turns a peer's parameters into a plan: corrections, and rejections that the peer measures with trainer and
sampler exchanged. Where a peer leaves rejected tokens their weight, they are compared where it keeps them.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden_data import (
    IS_SHIPPED,
    Case,
    Exclusion,
    Params,
    all_params_read,
    cases,
    largest_exponent,
    missing_here,
    relative_error,
    tolerance,
)
from toolkit.functional.mismatch import MismatchTerms, corrected, normalizer_parts
from toolkit.functional.mismatch_metrics import mismatch_metrics
from toolkit.functional.segments import turn_ids
from toolkit.losses.config.correction import CorrectionConfig
from toolkit.metrics import to_floats

Fields = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How the peer's function is said in corrections."""

    corrections: tuple[CorrectionConfig, ...]
    exchanged: tuple[CorrectionConfig, ...] = ()
    """Rejections measured with p and q exchanged: a KL(p || q)."""


def weight(**fields: Any) -> CorrectionConfig:
    lower = fields.get("lower")
    return CorrectionConfig(**{"action": "clamp_upper" if lower is None else "clamp", **fields})


def reject(**fields: Any) -> CorrectionConfig:
    return CorrectionConfig(**{"action": "mask", "denominator": "original", **fields})


def unit(level: str) -> Fields:
    """Return the granularity and reduction behind the names that peers use."""
    return {
        "token": {},
        "segment": {"granularity": "segment", "reduction": "mean"},
        "geometric": {"granularity": "sequence", "reduction": "mean"},
        "sequence": {"granularity": "sequence", "reduction": "sum"},
        "product": {"granularity": "sequence", "reduction": "sum"},
    }[level]


# ------------------------------------------------------------------------------------------------ peers


def areal(case: Case) -> Plan:
    usual = {"level": "token", "action": "mask", "metric": "ratio", "agg": "mean", "lower": None, "upper": 2.0}
    given = case.params.over(usual)  # an upper of 2 is the file's convention; AReaL's own default is 5
    free = {"max_log_ratio": None}
    agg, metric = given["agg"], given["metric"]  # of a clamp neither has an effect on the weight
    is_geometric = given["level"] == "sequence" and metric == "ratio"
    own = {**(unit("geometric") if is_geometric else {}), **free}
    bounds = {"lower": given["lower"], "upper": given["upper"]}
    if given["action"] == "clamp":
        return Plan((weight(**own, **bounds),))
    statistic = metric.removeprefix("kl_")
    per_sequence = {"granularity": "sequence", "reduction": agg} if given["level"] == "sequence" else {}
    rejection = reject(statistic=statistic, **per_sequence, **bounds, **free)
    if statistic in ("k1", "k3"):
        return Plan((weight(**own),), (rejection,))
    return Plan((weight(**own), rejection))


def ms_swift(case: Case) -> Plan:
    level, action = case.params["mode"].split("_")
    threshold, own = case.params["threshold"], unit("token" if level == "token" else "geometric")
    own |= {"max_token_log_ratio": 20.0}
    if action == "truncate":
        return Plan((weight(upper=threshold, **own),))
    return Plan((weight(max_token_log_ratio=20.0), reject(upper=threshold, **own)))


def open_instruct(case: Case) -> Plan:
    usual: Fields = {"rho_clamp_lower_bound": 0.0, "rho_clamp_upper_bound": 2.0, "rho_mask_sequence_level": False}
    usual |= {"rho_mask_lower_bound": 0.0, "rho_mask_upper_bound": 0.0, "use_rho_correction": True}
    given = case.params.over({**usual, "rho_mask_tv_divergence": False})
    is_variation = given["rho_mask_tv_divergence"]
    own = unit("geometric" if given["rho_mask_sequence_level"] else "token") | {"max_token_log_ratio": 10.0}

    def bounds(kind: str) -> Fields:
        return {side: given[f"rho_{kind}_{side}_bound"] or None for side in ("lower", "upper")}

    corrections = [weight(**own, **bounds("clamp"))]
    if any(bounds("mask").values()):
        if is_variation:
            own = unit("geometric") | {"statistic": "ratio_tv", "advantages": "widening", "max_token_log_ratio": 10.0}
        corrections.append(reject(**own, **bounds("mask")))
    return Plan(tuple(corrections) if given["use_rho_correction"] else ())


def roll(case: Case) -> Plan:
    is_weight = case.params.get("is_weight") or Params({})
    is_weight = is_weight.over({"enabled": True, "weight_type": "token", "upper_bound": 1.2})
    free = {"max_log_ratio": None}
    corrections = []
    bounded = weight(upper=is_weight["upper_bound"], **unit(is_weight["weight_type"]), **free)
    if is_weight["enabled"]:
        corrections.append(bounded)
    for given in case.params.get("filters", []):
        usual = {"enabled": True, "agg_type": "token", "ratio_enabled": True, "ratio_low": 0.8, "ratio_high": 1.2}
        rule = given.over({**usual, "diff_enabled": False, "diff_low": -0.2, "diff_high": 0.2})
        is_enabled, level = rule["enabled"], unit(rule["agg_type"])
        for kind, statistic in (("ratio", "ratio"), ("diff", "prob_diff")):
            bounds, is_used = {"lower": rule[f"{kind}_low"], "upper": rule[f"{kind}_high"]}, rule[f"{kind}_enabled"]
            if is_enabled and is_used:
                corrections.append(reject(statistic=statistic, **bounds, **level, **free))
    return Plan(tuple(corrections))


def skyrl(case: Case) -> Plan:
    usual: Fields = {"tis_ratio_type": None, "sequence_mask_metric": None, "geo_mask_high": 1.01, "geo_mask_low": 0.99}
    usual |= {"token_tis_ratio_clip_high": 2.0, "sequence_tis_ratio_clip_high": 5.0}
    given = case.params.over({**usual, "product_mask_high": 2.0, "product_mask_low": 0.5})
    corrections = []
    if level := given["tis_ratio_type"]:
        corrections.append(weight(upper=given[f"{level}_tis_ratio_clip_high"], **unit(level)))
    if metric := given["sequence_mask_metric"]:
        name = {"geometric": "geo", "product": "product"}[metric]
        bounds = {"lower": given[f"{name}_mask_low"], "upper": given[f"{name}_mask_high"]}
        corrections.append(reject(**bounds, **unit(metric)))
    for name, action in (("outlier_token_is_threshold", "veto"), ("token_mask_is_threshold", "mask")):
        lower, upper = given.get(f"{name}_low"), given.get(f"{name}_high")
        if (lower, upper) != (None, None):
            corrections.append(reject(action=action, lower=lower, upper=upper))
    return Plan(tuple(corrections))


def slime(case: Case) -> Plan:
    bounds = {"lower": case.params.get("tis_clip_low", 0.0), "upper": case.params.get("tis_clip", 2.0)}
    if case.entry == "tis":
        return Plan((weight(**bounds, max_log_ratio=None),))
    return Plan((weight(max_log_ratio=None), reject(**bounds, max_log_ratio=None)))


def trl(case: Case) -> Plan:
    opsm = {"statistic": "k1", "between": "current_rollout", "advantages": "negative", **unit("geometric")}
    return Plan((reject(upper=case.params["delta"], **opsm),))


def verl(case: Case) -> Plan:
    if "rollout_is" in case.params:
        own = unit(case.params["rollout_is"])
        lower, upper = pair(case.params["threshold"])
        if lower is not None:
            return Plan((weight(**own), reject(lower=lower, upper=upper, **own)))
        return Plan((weight(upper=upper, normalize=case.params.get("batch_normalize", False), **own),))
    names = case.params["rollout_rs"].split(",")
    thresholds = str(case.params["threshold"]).split(",")
    thresholds = thresholds * len(names) if len(thresholds) == 1 else thresholds
    return Plan(tuple(verl_rejection(*both) for both in zip(names, thresholds, strict=True)))


def verl_rejection(name: str, threshold: str) -> CorrectionConfig:
    parts = name.strip().split("_")
    own = {} if parts[0] == "token" else {"granularity": "sequence", "reduction": parts[1]}
    lower, upper = pair(threshold)
    if parts[-1] != "k1":
        return reject(statistic=parts[-1], upper=upper, **own)
    lower = 1 / upper if lower is None else lower
    return reject(statistic="k1", lower=math.log(lower), upper=math.log(upper), **own)


def pair(threshold: Any) -> tuple[float | None, float]:
    """Read verl's "lower_upper" or "upper"."""
    *lower, upper = str(threshold).strip().split("_")
    return (float(lower[0]) if lower else None), float(upper)


def xtuner(case: Case) -> Plan:
    given, own = case.params, unit(case.params["level"])
    upper, lower = given["threshold"]
    is_clamped = given["mode"] in ("truncate", "both")
    corrections = [weight(lower=lower, upper=upper, **own) if is_clamped else weight(**own)]
    if given["mode"] in ("mask", "both"):
        upper, lower = given.get("mask_threshold") or given["threshold"]
        corrections.append(reject(lower=lower, upper=upper, **own))
    if given.get("veto"):
        upper, lower = given["veto"]
        corrections.append(reject(action="veto", lower=lower, upper=upper))
    return Plan(tuple(corrections))


PEERS: dict[str, Callable[[Case], Plan]] = {
    "areal": areal,
    "ms_swift": ms_swift,
    "open_instruct": open_instruct,
    "roll": roll,
    "skyrl": skyrl,
    "slime": slime,
    "trl": trl,
    "verl": verl,
    "xtuner": xtuner,
}


def plan_of(case: Case) -> Plan:
    """Return how a case is said in corrections; every parameter must be read."""
    with all_params_read(case, {}):
        return PEERS[case.peer](case)


def outcome(case: Case) -> str:
    """Return how a case is compared: a category of exclusion, "adjusted" or "matched"."""
    if exclusion := excluded(case):
        return exclusion.category
    # Adjusted: trainer and sampler exchanged, which no setting does, or a mean with another denominator.
    return "adjusted" if plan_of(case).exchanged or divides_by_more(case) else "matched"


def excluded(case: Case) -> Exclusion | None:
    """Return why a case is not compared, None if it is."""
    given = case.params
    if case.entry == "vespo_phi":
        return missing_here("the weight inside VESPO: no correction gives it, and the vespo loss is compared with it")
    is_binary = "binary_kl" in (given.get("metric"), *str(given.get("rollout_rs")).split(","))
    if is_binary and case.peer in ("areal", "verl"):
        return missing_here("larger of two binary KL divergences: not a statistic here")
    is_odd_clamp = given.get("level") == "sequence" and given.get("agg", "mean") != "mean"
    if case.peer == "areal" and given.get("action") == "clamp" and is_odd_clamp:
        return missing_here("clamps the geometric mean only where another statistic is out of bounds")
    if case.peer == "verl" and given.get("batch_normalize") and "_" in str(given["threshold"]):
        return missing_here("the mean counts rejected tokens as 0; here the mean is that of the ratios")
    masks_first = any(
        given.get(f"{kind}_is_threshold_{side}") is not None
        for kind in ("outlier_token", "token_mask")
        for side in ("low", "high")
    )
    if case.peer == "skyrl" and masks_first and (
        given.get("sequence_mask_metric") or given.get("tis_ratio_type") == "sequence"
    ):  # fmt: skip
        return missing_here("the sequence statistic skips tokens that another mask rejected")
    return None


# ------------------------------------------------------------------------------------------------ ours

CASES = list(cases("is_correction"))
EPSILON = 1e-8
"""What some peers add to a denominator."""
COMPARED = [case for case in CASES if excluded(case) is None]


def terms_of(case: Case) -> MismatchTerms:
    given = case.inputs
    is_scored = given["response_mask"] == 1
    rows = torch.arange(len(is_scored)).unsqueeze(-1).expand(is_scored.shape)
    turns = turn_ids(is_scored, rows)
    return MismatchTerms(
        rollout_logprobs=given["rollout_log_probs"][is_scored],
        old_logprobs=given["old_log_probs"][is_scored],
        current_logprobs=given["log_probs"][is_scored],
        advantages=given["advantages"][is_scored],
        sequence_ids=rows[is_scored],
        num_sequences=len(is_scored),
        turn_ids=turns[is_scored],
        num_turns=int(turns.max()) + 1,
    )


def exchanged(terms: MismatchTerms) -> MismatchTerms:
    assert terms.old_logprobs is not None
    fields = vars(terms) | {"old_logprobs": terms.rollout_logprobs, "rollout_logprobs": terms.old_logprobs}
    return MismatchTerms(**fields)


def ours(case: Case) -> tuple[Tensor, Tensor]:
    """Return our weights (0 where rejected) and what is kept."""
    plan, terms = plan_of(case), terms_of(case)
    found = corrected(plan.corrections, terms, normalizer_parts(plan.corrections, terms))
    is_kept = found.is_kept & corrected(plan.exchanged, exchanged(terms)).is_kept
    return found.weights.where(is_kept, 0.0), is_kept


@pytest.mark.parametrize("case", COMPARED, ids=lambda case: case.name)
def test_equals_the_peer(case: Case) -> None:
    weights, is_kept = ours(case)
    their_kept = torch.ones_like(is_kept)
    if "keep_mask" in case.outputs:
        their_kept = case.tensor("keep_mask") != 0
        assert is_kept.tolist() == their_kept.tolist()
    if "weights" in case.outputs:
        theirs = case.tensor("weights").where(their_kept, 0.0)
        # (n + 1e-8) for n moves a mean log ratio, and its exponential, by 1e-8 of it, and a mean by 1e-8.
        of_epsilon = EPSILON * (1 + largest_exponent(case)) if divides_by_more(case) else 0.0
        assert relative_error(weights, theirs) <= tolerance(case) + of_epsilon


def divides_by_more(case: Case) -> bool:
    """Whether a peer's mean divides by count + 1e-8."""
    return case.params.get("level") == "geometric" or bool(case.params.get("batch_normalize"))


def measured_ratios(case: Case) -> Tensor:
    """Return what a peer's metrics call the ratio: verl's clamped but not normalised, the others' as they are."""
    if case.peer == "verl":
        plan = [cfg.model_copy(update={"normalize": False}) for cfg in plan_of(case).corrections]
        return corrected(plan, terms_of(case)).weights
    return corrected([weight(**unit(case.params.get("level", "token")))], terms_of(case)).weights


@pytest.mark.parametrize("case", [case for case in COMPARED if "metrics" in case.outputs], ids=lambda case: case.name)
def test_metrics_that_are_defined_alike(case: Case) -> None:
    """Mean and largest ratio, the share of samples that the clamped ratios are worth, and the share that is kept."""
    theirs, (_, is_kept), terms = case.outputs["metrics"], ours(case), terms_of(case)

    def measured(weights: Tensor) -> dict[str, float]:
        assert terms.old_logprobs is not None
        return to_floats(mismatch_metrics(terms.old_logprobs, terms.rollout_logprobs, weights, is_kept))

    if case.peer == "areal":
        if case.params.get("action", "mask") == "mask":
            assert 1 - measured(ours(case)[0])["rollout_kept"] == pytest.approx(theirs["filtered_fraction"], abs=1e-9)
        return
    ratios = measured_ratios(case)
    found = measured(ratios)
    compared = [("rollout_is_mean", "rollout_weight"), ("is_ratio_mean", "rollout_weight")]
    if (case.params.get("rollout_is") or case.params.get("level", "token")) == "token":
        # That of sequences is measured before the clamp and counts a row without a token as 1.
        compared += [("rollout_is_max", "rollout_weight_max"), ("is_ratio_max", "rollout_weight_max")]
    for name, own in compared:
        if name in theirs:
            assert found[own] == pytest.approx(float(theirs[name]), rel=1e-6), name
    if "rollout_is_eff_sample_size" in theirs:
        lower, upper = ess_bounds(case)
        ess = measured(ratios.clamp(lower, upper))["rollout_ess"]
        assert ess == pytest.approx(float(theirs["rollout_is_eff_sample_size"]), rel=1e-6)


def ess_bounds(case: Case) -> tuple[float, float]:
    """Return between which bounds a peer clamps ratios before it measures their effective sample size.

    verl measures the weights that it applies: IcePop's zeros stay 0, and so does what lies below 1 / threshold.
    """
    if case.peer == "xtuner":
        upper, lower = case.params["threshold"]
        return lower, upper
    return 0.0, pair(case.params["threshold"])[1]


@pytest.mark.skipif(not IS_SHIPPED, reason="takes certain cases of ours")
def test_the_zeros_of_icepop_stay_zero_in_the_sample_size() -> None:
    case = next(case for case in CASES if case.peer == "verl" and case.params.get("threshold") == "0.5_5.0")
    mask = case.inputs["response_mask"] == 1
    ratios = (case.inputs["old_log_probs"] - case.inputs["rollout_log_probs"])[mask].exp()
    ratios = ratios.where((ratios >= 0.5) & (ratios <= 5.0), 0.0)
    assert (ratios == 0).any()
    size = float(ratios.mean() ** 2 / ratios.square().mean())
    test_metrics_that_are_defined_alike(
        dataclasses.replace(case, outputs={"metrics": {"rollout_is_eff_sample_size": size}})
    )


@pytest.mark.skipif(not IS_SHIPPED, reason="other cases may be any")
def test_few_cases_are_excluded() -> None:
    reasons = [excluded(case) for case in CASES]
    assert len(CASES) > 0
    assert sum(reason is not None for reason in reasons) <= 0.1 * len(CASES)
    assert {case.peer for case in CASES} <= set(PEERS)
