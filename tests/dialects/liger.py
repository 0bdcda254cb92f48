"""Liger: TRL's loss types, each with a KL term by default (``beta`` = 0.04)."""

from __future__ import annotations

from typing import Any

from tests.dialects import Run, trl
from tests.dialects.parts import NO_KL, preset_of, scored_tokens, without_effect
from tests.golden_data import Case, Exclusion, peers_error

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = {
    **without_effect(("sapo", "vespo"), ("epsilon_low", "epsilon_high"), "a loss without a range"),
    **without_effect(("cispo",), ("epsilon_low",), "Liger's CISPO has a ceiling and no floor"),
    **trl.lengths_without_effect(("grpo", "bnpo", "dapo", "cispo", "sapo", "vespo", "gspo", "luspo")),
    **trl.counts_without_effect(("grpo", "bnpo", "dr_grpo", "sapo", "luspo"), ("num_items_in_batch",)),
}
WEIGHT_MAX = 2.0
"""Cap of the rollout weights where a case gives them."""


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    if case.params.get("loss_type") == "luspo" and case.params.get("beta"):
        return peers_error("with a KL term Liger 0.8.5 averages LUSPO over the padded width (TRL has it right in 1.16)")
    return None


def translate(case: Case) -> Run:
    """Return our run of a case."""
    given = case.params
    trl.check_level(case)
    policy_loss = {ours: given[theirs] for theirs, ours in trl.OPTIONS.items() if given.get(theirs) is not None}
    if case.entry == "vespo":
        policy_loss = {name: trl.single(value) for name, value in policy_loss.items()}
    policy_loss |= clip_range(case)
    loss: dict[str, Any] = {"aggregation": trl.aggregation_of(given)}
    if "beta" in given:
        loss |= trl.kl_of(given) or NO_KL
    if given.get("_is") and case.entry == "vespo":
        policy_loss |= {"use_rollout_weight": True, "rollout_weight_max": WEIGHT_MAX}
    elif given.get("_is"):
        loss["correction"] = [{"action": "clamp_upper", "upper": WEIGHT_MAX}]
    return Run(preset=preset_of(case), policy_loss=policy_loss, loss=loss, scale=scale_of(case))


def scale_of(case: Case) -> float:
    """Return our tokens over those that the peer is told it divides by, where it divides by tokens of a step."""
    if case.params.get("loss_type") not in trl.PER_TOKEN:
        return 1.0
    tokens = scored_tokens(case)
    return tokens / float(case.params.get("num_items_in_batch") or tokens)


def clip_range(case: Case) -> dict[str, float]:
    """Return the range of a case; either side is 0.2 where it is not given, and CISPO has a ceiling alone."""
    if case.entry in ("sapo", "vespo"):
        return {}
    high = case.params.get("epsilon_high", 0.2)
    if case.entry == "cispo":
        return {"weight_max": high}
    return {"cliprange_low": case.params.get("epsilon_low", 0.2), "cliprange_high": high}
