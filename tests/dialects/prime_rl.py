"""prime-rl's loss functions: always against the sampler's policy, a sum over all tokens' count."""

from __future__ import annotations

from tests.dialects import Run
from tests.dialects.parts import preset_of, renamed
from tests.golden_data import Case

EXCLUDED: dict[str, str] = {}
OPTIONS = {
    "dppo_mask_low": "threshold_low",
    "dppo_mask_high": "threshold_high",
    "ipo_threshold": "threshold",
    "kl_tau": "log_ratio_sq_coef",
}


def translate(case: Case) -> Run:
    fields = {"teacher_logprobs": "ref_log_probs"} if case.entry.startswith("ref_kl") else {}
    return Run(preset=preset_of(case), policy_loss=renamed(case.params, OPTIONS), fields=fields)
