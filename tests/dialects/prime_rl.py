"""prime-rl's loss functions: always against the sampler's policy, a sum over all tokens' count."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import preset_of, renamed, scored_tokens, without_effect
from tests.golden_data import Case, Exclusion

EXCLUDED: dict[str, Exclusion] = {}
OPTIONS = {
    "dppo_mask_low": "threshold_low",
    "dppo_mask_high": "threshold_high",
    "ipo_threshold": "threshold",
    "kl_tau": "log_ratio_sq_coef",
}
CONFIGURED = ("default_dppo", "ipo")
"""Losses of the config; the numbers of the others are fixed."""
IGNORED = without_effect(("ref_kl_opd", "ce"), (*OPTIONS, "adv_tau"), "a component whose numbers no config changes")
SCALES = {"default_dppo": "rl_scale", "ipo": "rl_scale", "ref_kl_opd": "ref_kl_scale", "ce": "ce_scale"}
"""What a component's sum is divided by, where the call says it: the tokens of the step."""


def translate(case: Case) -> Run:
    fields = {"teacher_logprobs": "ref_log_probs"} if case.entry.startswith("ref_kl") else {}
    tokens, is_configured = scored_tokens(case), case.entry in CONFIGURED
    return Run(
        preset=preset_of(case),
        policy_loss=renamed(case.params, OPTIONS) if is_configured else {},
        fields=fields,
        scale=tokens / float(case.params.get(SCALES[case.entry]) or tokens),
        advantage_scale=float(case.params.get("adv_tau", 1.0)) if is_configured else 1.0,
    )
