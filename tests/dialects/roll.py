"""ROLL's `ActorPGWorker` losses, reduced by its `agg_loss`."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import Fields, preset_of, renamed, scored_rows, scored_tokens
from tests.golden_data import Case, Exclusion, Params, peers_error

EXCLUDED: dict[str, Exclusion] = {}
IGNORED = {
    "batch_num_tokens": "only token-mean divides by it",
    "global_valid_samples": "only the means over sequences divide by it",
}
UNMASKED_MEAN = "token-mean lets the tokens between turns into the sum, with their gradient: a mean over other tokens"
OPTIONS = {
    "tis_lower_bound": "weight_min",
    "tis_upper_bound": "weight_max",
    "topr_positive_weight": "positive_weight",
    "topr_negative_weight": "negative_weight",
    "cispo_epsilon_low": "cliprange_low",
    "cispo_epsilon_high": "cliprange_high",
    "cispo_use_unified_mask": "use_unified_mask",
    "kimi15_tau": "tau",
}
EPSILON = 1e-8
"""Its mean over the tokens of a row divides by their number and this."""


def translate(case: Case) -> Run:
    policy_loss = renamed(case.params, OPTIONS)
    if case.entry == "ppo":
        policy_loss |= ppo(case.params)
    name, scale = case.params.get("loss_agg_mode", "seq-mean-token-mean"), 1.0
    aggregation: Fields = {"name": name.replace("-", "_")}
    if name == "seq-mean-token-sum-norm":  # divides by the padded width, and not by the number of sequences
        width = case.inputs["response_mask"].shape[-1]
        aggregation, scale = {"name": "constant", "length": width}, float(scored_rows(case))
    elif name == "token-mean":
        scale = scored_tokens(case) / float(case.params.get("batch_num_tokens") or scored_tokens(case))
    else:
        scale = scored_rows(case) / float(case.params.get("global_valid_samples") or scored_rows(case))
    return Run(
        preset=preset_of(case),
        policy_loss=policy_loss,
        loss={"aggregation": aggregation},
        row_epsilon=EPSILON if name == "seq-mean-token-mean" else 0.0,
        scale=scale,
    )


def reason_to_exclude(case: Case) -> Exclusion | None:
    """What depends on the parameters."""
    has_holes = int(case.inputs["seq_lens"].sum()) != scored_tokens(case)
    is_unmasked = case.params.get("loss_agg_mode") == "token-mean" and has_holes
    return peers_error(UNMASKED_MEAN) if is_unmasked else None


def ppo(given: Params) -> Fields:
    clip = given.get("pg_clip", 0.2)
    low, high = given.get("pg_clip_low", 0.2), given.get("pg_clip_high", 0.2)
    if not given.get("use_pg_clip_range"):
        low, high = clip, clip
    dual = 1 + 2 * clip if given.get("dual_clip_loss") else None
    return {"cliprange_low": low, "cliprange_high": high, "clip_ratio_c": dual}
