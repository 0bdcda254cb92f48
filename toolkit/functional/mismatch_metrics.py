"""Metrics of the mismatch of sampler and trainer, and of its corrections. N: selected tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.functional.kl import KL_VALUES
from toolkit.functional.mismatch import Corrected, Correction
from toolkit.functional.names import MAX_LOG_RATIO
from toolkit.functional.segments import segment_sum
from toolkit.metrics import EffectiveSampleSize, Max, Mean, Metric, Min


@torch.no_grad()
def mismatch_metrics(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    weights: Tensor,
    is_kept: Tensor,
    sequence_ids: Tensor | None = None,
    num_sequences: int = 0,
) -> dict[str, Metric]:
    """Measure how far sampler and trainer are apart, and the effect of the corrections.

    Metrics of parts merge to those of all tokens. With d = log p - log q: ``rollout_mismatch`` mean |d|, ``_max``
    the largest; ``rollout_k1`` and ``_k3`` KL(q || p); ``rollout_chi2`` mean e^2d - 1; ``rollout_prob_diff`` mean
    |p - q|; ``rollout_weight`` (with ``_min`` and ``_max``) and ``rollout_ess`` the final weights, 0 where rejected;
    ``rollout_kept`` the tokens kept, ``rollout_kept_sequences`` the sequences with a kept token.

    Args:
        old_logprobs: [N] log p in nats.
        rollout_logprobs: [N] log q in nats; a NaN (not reported) excludes the token from comparisons of the policies.
        weights: [N] from `corrected`.
        is_kept: [N] from `corrected`.
        sequence_ids: [N] int64, to count sequences too.
        num_sequences: how many there are.
    """
    is_known = rollout_logprobs.isfinite()
    p, q = old_logprobs.double()[is_known], rollout_logprobs.double()[is_known]
    log_ratio = p - q
    bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    metrics: dict[str, Metric] = {
        "rollout_mismatch": Mean.of(log_ratio.abs()),
        "rollout_mismatch_max": Max.of(log_ratio.abs()),
        "rollout_k1": Mean.of(-log_ratio),
        "rollout_k3": Mean.of(KL_VALUES["k3"](-bounded)),
        "rollout_chi2": Mean.of((2 * bounded).expm1()),
        "rollout_prob_diff": Mean.of((p.exp() - q.exp()).abs()),
        "rollout_weight": Mean.of(weights),
        "rollout_weight_min": Min.of(weights),
        "rollout_weight_max": Max.of(weights),
        "rollout_ess": EffectiveSampleSize.of(weights),
        "rollout_kept": Mean.of(is_kept),
    }
    if sequence_ids is not None:
        counts = segment_sum(torch.ones_like(weights), sequence_ids, num_sequences)
        kept = segment_sum(is_kept.to(weights.dtype), sequence_ids, num_sequences)
        metrics["rollout_kept_sequences"] = Mean((kept > 0).double().sum(), (counts > 0).double().sum())
    return metrics


def correction_metrics(corrections: Sequence[Correction], result: Corrected) -> dict[str, Metric]:
    """Return the fraction of tokens that each correction rejected or clamped, e.g. ``rollout_mask_token_ratio``.

    A second correction of the same kind gets "_2" after its name, and so on.
    """
    names = [f"rollout_{c.action}_{c.granularity}_{c.statistic}" for c in corrections]
    metrics: dict[str, Metric] = {}
    for index, (name, is_hit) in enumerate(zip(names, result.is_hit, strict=True)):
        same = names[:index].count(name)
        metrics[f"{name}_{same + 1}" if same else name] = Mean.of(is_hit)
    return metrics
