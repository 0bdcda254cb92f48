"""Made-up tokens for the tests of policy losses, and how to ask a loss for its values and gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.functional.policy.reference import Sample
from toolkit.functional.policy.registry import policy_loss
from toolkit.functional.terms import PolicyTerms

UNBOUNDED = (None, None)
BOUNDED = (-20.0, 20.0)
OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "aspo": [{"weight_max": None, "clip_ratio_c": None}, {"weight_max": 1.5, "anchor": "rollout"}],
    "cispo": [
        {"cliprange_low": None, "weight_max": 5.0},
        {"cliprange_low": None, "cliprange_high": None, "anchor": "rollout"},
        {"weight_min": 0.5, "weight_max": 1.5, "use_unified_mask": True},
    ],
    # At the default share a draw decides; all that are eligible leave no choice.
    "clip_cov": [{"clip_cov_ratio": 1.0, "cov_low": 0.1, "clip_ratio_c": 3.0}],
    "dppo_kl": [{"form": "score", "clip_ratio_c": 2.0}, {"log_ratio_sq_coef": 0.01, "anchor": "rollout"}],
    "dppo_tv": [
        {"form": "score", "clip_ratio_c": 2.0, "threshold_low": 0.05, "threshold_high": 0.02},
        {"clip_ratio_c": 2.0},
        {"log_ratio_sq_coef": 0.01, "anchor": "rollout"},
    ],
    "dro": [{"tau": 0.5, "anchor": "rollout"}],
    "fipo": [
        {"only_raise": False, "half_life": 2.0, "delta": 3.0, "safety_threshold": 1.1},
        {"weight_range": None, "safety_threshold": None, "clip_ratio_c": 3.0},
    ],
    "gmpo": [{"cliprange_low": 0.1, "cliprange_high": 1.0, "anchor": "rollout"}],
    "gspo": [
        {"cliprange_low": 0.2, "average_advantages": True, "clip_ratio_c": 1.5},
        {"anchor": "self"},
        {"delta": 1.2},
    ],
    "gspo_token": [{"cliprange_high": 0.2, "clip_ratio_c": 1.5}, {"anchor": "rollout", "delta": 1.2}],
    "ipo": [{"threshold": 0.02, "log_ratio_sq_coef": 0.0, "anchor": "old"}],
    "is_reinforce": [{"anchor": "rollout"}, {"anchor": "self"}],
    "kimi": [{"tau": 0.0}],
    "kl_cov": [{"kl_cov_ratio": 0.3, "kl_coef": 0.2}, {"kl_cov_ratio": 0.0}],
    "luspo": [{"cliprange_low": 0.2, "cliprange_high": 0.5, "anchor": "rollout"}],
    "nll": [{"only_positive": False}],
    "opd": [{"threshold_low": 0.02, "log_ratio_sq_coef": 0.01, "anchor": "rollout"}, {"anchor": "self"}],
    "real": [{"tau": 0.05, "only_mixed": True}],
    "rloo_sequence": [{"cliprange_high": 1.0, "clip_ratio_c": 3.0, "anchor": "rollout"}, {"delta": 1.5}],
    "rollout_is": [{"cliprange_low": 0.9, "cliprange_high": 3.0, "anchor": "old"}],
    "sapo": [{"tau_pos": 0.5, "tau_neg": 3.0, "anchor": "rollout"}],
    "sapo_sequence": [{"tau_pos": 0.5, "average_advantages": False}],
    "sdar": [{"gate_beta": 1.0}],
    "segment_ratio": [{"cliprange_low": 0.01, "clip_ratio_c": 1.4, "anchor": "rollout"}, {"delta": 1.3}],
    "tis": [{"weight_min": None, "weight_max": None}, {"weight_min": 0.2, "weight_max": 2.0, "anchor": "rollout"}],
    "topr": [{"weight_min": 0.1, "weight_max": 2.0, "positive_weight": 0.5, "negative_weight": 2.0}],
    "topr_sequence": [{"weight_max": 2.0, "positive_weight": 0.5, "anchor": "rollout"}, {"token_ratio": True}],
    "vanilla": [{"clip_ratio_c": None, "delta": 4.0}, {"clip_ratio_c": None}, {"anchor": "self", "cliprange_low": 0.5}],
    "vespo": [{"k_pos": 1.0, "lambda_neg": 0.5}, {"use_rollout_weight": True, "rollout_weight_max": None}],
}
"""Values of options beside the defaults that every general test also runs with."""


def tokens(
    log_ratios: Sequence[float],
    advantages: Sequence[float],
    *,
    sequences: Sequence[int] | None = None,
    logprobs: float | Sequence[float] = -1.0,
    log_ratio_range: tuple[float | None, float | None] = BOUNDED,
    **fields: Sequence[Any],
) -> PolicyTerms:
    """Tokens of float64 with these log ratios to the old policy; `sequences` is one by default.

    Other fields (rollout_logprobs, teacher_logprobs, turn_ids, group_ids, positions) are given as they are.
    """
    count = len(log_ratios)
    current = torch.tensor([logprobs] * count if isinstance(logprobs, float) else list(logprobs), dtype=torch.float64)
    ids = list(sequences or [0] * count)
    is_id = {"turn_ids", "group_ids", "positions"}
    tensors: dict[str, Any] = {
        name: torch.tensor(values, dtype=torch.int64 if name in is_id else torch.float64)
        for name, values in fields.items()
    }
    for what in ("turn", "group"):
        if f"{what}_ids" in tensors:
            tensors[f"num_{what}s"] = int(tensors[f"{what}_ids"].max()) + 1
    return PolicyTerms(
        logprobs=current,
        old_logprobs=current - torch.tensor(log_ratios, dtype=torch.float64),
        advantages=torch.tensor(advantages, dtype=torch.float64),
        sequence_ids=torch.tensor(ids),
        num_sequences=max(ids, default=-1) + 1,
        log_ratio_range=log_ratio_range,
        **tensors,
    )


def ratios(*values: float) -> list[float]:
    """The logs of ratios."""
    return [math.log(value) for value in values]


def values_and_grads(
    name: str, terms: PolicyTerms, weights: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The token losses, and the gradient of their (weighted) sum: [N] each. Reports are in ``terms.reports()``."""
    loss = policy_loss(name)
    logprobs = terms.logprobs.detach().requires_grad_()
    losses = loss.function(replace(terms, logprobs=logprobs), **loss.options(options))
    assert losses.shape == logprobs.shape
    total = losses.sum() if weights is None else (weights * losses).sum()
    grads = torch.autograd.grad(total, logprobs, allow_unused=True)[0] if total.requires_grad else None
    return losses.detach(), torch.zeros_like(logprobs) if grads is None else grads


def check(name: str, terms: PolicyTerms, losses: Sequence[float], grads: Sequence[float], **options: Any) -> None:
    """Compare with numbers worked out by hand."""
    found = values_and_grads(name, terms, **options)
    for ours, expected in zip(found, (losses, grads), strict=True):
        torch.testing.assert_close(ours, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def reports(terms: PolicyTerms) -> dict[str, float]:
    """What the loss reported of itself."""
    return {name: metric.value() for name, metric in terms.reports().items()}


def from_sample(sample: Sample, dtype: torch.dtype = torch.float64) -> PolicyTerms:
    """A sample of the reference as tensors."""

    def real(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(dtype)

    return PolicyTerms(
        logprobs=real(sample.logprobs),
        old_logprobs=real(sample.old),
        rollout_logprobs=real(sample.rollout),
        teacher_logprobs=real(sample.teacher),
        advantages=real(sample.advantages),
        sequence_ids=torch.tensor(sample.sequences),
        num_sequences=max(sample.sequences) + 1,
        turn_ids=torch.tensor(sample.turns),
        num_turns=max(sample.turns) + 1,
        group_ids=torch.tensor(sample.groups),
        num_groups=max(sample.groups) + 1,
        positions=torch.tensor(sample.positions),
        log_ratio_range=sample.log_ratio_range,
    )
