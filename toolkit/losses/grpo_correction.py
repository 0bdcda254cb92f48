"""Corrections of the mismatch between the sampler and the trainer, applied to the items of a step.

Those between the old policy and the sampler are known before the first forward, so that rejected tokens can leave the
denominators of all ranks; those with the current policy ("late") are applied in the forward.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.distributed import all_reduce_sum
from toolkit.errors import ConfigError
from toolkit.functional.mismatch import (
    Corrected,
    MismatchTerms,
    corrected,
    correction_metrics,
    mismatch_metrics,
    normalizer_parts,
)
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.correction import CorrectionConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.metrics import Metric


@dataclass(frozen=True)
class CorrectedBatch:
    """A micro-batch after the corrections that are known before the forward."""

    labels: Tensor
    """[B, T] labels, ignored where a token left the denominator."""
    policy_weight: Tensor | None
    """[B, T] float64 weight of the policy term, 0 where rejected; None: 1 everywhere."""
    metrics: dict[str, Metric]


def early(cfg: BaseRLLossConfig) -> tuple[CorrectionConfig, ...]:
    """Return the corrections that are known before the forward."""
    return tuple(correction for correction in cfg.correction if not correction.needs_current)


def late(cfg: BaseRLLossConfig) -> tuple[CorrectionConfig, ...]:
    """Return the corrections that compare the current policy."""
    return tuple(correction for correction in cfg.correction if correction.needs_current)


def corrected_batches(
    items: list[RLLossContextInputItem],
    ids: Sequence[Tensor],
    turns: Sequence[Tensor],
    cfg: BaseRLLossConfig,
    sp_mesh: DeviceMesh | None,
) -> list[CorrectedBatch]:
    """Apply the corrections that are known before the forward; every rank must call it together."""
    corrections = early(cfg)
    if sp_mesh is not None and any(correction.needs_sequences for correction in corrections):
        raise ConfigError(
            "a correction over turns or sequences does not work under sequence parallelism, which cuts them apart; use "
            "granularity='token' or no sp_mesh"
        )
    scored = [(item.shifted_labels != cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1) for item in items]
    terms = [_mismatch_terms(*parts, cfg) for parts in zip(items, scored, ids, turns, strict=True)]
    sums = None
    if any(correction.normalize for correction in corrections):
        device = items[0].shifted_labels.device if items else torch.device("cpu")
        parts = torch.zeros(len(corrections), 2, dtype=torch.float64, device=device)
        sums = all_reduce_sum(sum((normalizer_parts(corrections, own) for own in terms if own is not None), parts))
    return [
        _corrected_batch(item, positions, own, corrections, sums, cfg)
        for item, positions, own in zip(items, scored, terms, strict=True)
    ]


def comparable_rollout(item: RLLossContextInputItem, cfg: BaseRLLossConfig) -> Tensor | None:
    """Return the sampler's log-probabilities, unless they are of another distribution: not even for a metric then."""
    spec = item.rollout_spec
    is_other = spec is not None and spec.mismatch(cfg.temperature) is not None and not cfg.accept_mismatch
    return None if is_other else item.rollout_logprobs


def _mismatch_terms(
    item: RLLossContextInputItem, positions: Tensor, ids: Tensor, turns: Tensor, cfg: BaseRLLossConfig
) -> MismatchTerms | None:
    """Return what corrections look at, or None where the items cannot be compared with the sampler."""
    if item.old_logprobs is None or comparable_rollout(item, cfg) is None:
        return None
    assert item.rollout_logprobs is not None
    assert item.advantages is not None
    old, rollout, advantages, sequences, turn = (
        values.detach().reshape(-1).index_select(0, positions)
        for values in (item.old_logprobs, item.rollout_logprobs, item.advantages, ids, turns)
    )
    return MismatchTerms(
        rollout_logprobs=rollout.double(),
        old_logprobs=old.double(),
        advantages=advantages,
        sequence_ids=sequences,
        num_sequences=int(ids.max()) + 1 if ids.numel() else 0,
        turn_ids=turn,
        num_turns=int(turns.max()) + 1 if turns.numel() else 0,
    )


def _corrected_batch(
    item: RLLossContextInputItem,
    positions: Tensor,
    terms: MismatchTerms | None,
    corrections: tuple[CorrectionConfig, ...],
    sums: Tensor | None,
    cfg: BaseRLLossConfig,
) -> CorrectedBatch:
    labels = item.shifted_labels
    if terms is None:
        return CorrectedBatch(labels, None, {})
    result = corrected(corrections, terms, sums) if corrections else _untouched(terms)
    assert terms.old_logprobs is not None
    metrics = mismatch_metrics(
        terms.old_logprobs,
        terms.rollout_logprobs,
        result.weights,
        result.is_kept,
        terms.sequence_ids,
        terms.num_sequences,
    )
    if not corrections:
        return CorrectedBatch(labels, None, metrics)
    metrics |= correction_metrics(corrections, result)
    flat = torch.ones(labels.numel(), dtype=torch.float64, device=labels.device)
    weight = flat.index_copy(0, positions, result.weights).reshape(labels.shape)
    has_left = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
    has_left[positions] = ~result.in_denominator
    return CorrectedBatch(labels.masked_fill(has_left.reshape(labels.shape), cfg.ignore_idx), weight, metrics)


def _untouched(terms: MismatchTerms) -> Corrected:
    ones = torch.ones_like(terms.rollout_logprobs)
    return Corrected(weights=ones, is_kept=ones.bool(), in_denominator=ones.bool(), is_hit=())


def late_correction(terms: PolicyTerms, cfg: BaseRLLossConfig) -> tuple[Tensor | None, dict[str, Metric]]:
    """Apply the corrections that compare the current policy.

    Returns:
        Their weights [N], without gradient (None: 1 everywhere), and metrics.
    """
    corrections = late(cfg)
    if not corrections:
        return None, {}
    seen = MismatchTerms(
        rollout_logprobs=terms.old_logprobs if terms.rollout_logprobs is None else terms.rollout_logprobs,
        old_logprobs=terms.old_logprobs,
        current_logprobs=terms.logprobs.detach(),
        advantages=terms.advantages,
        sequence_ids=terms.sequence_ids,
        num_sequences=terms.num_sequences,
        turn_ids=terms.turn_ids,
        num_turns=terms.num_turns,
    )
    result = corrected(corrections, seen)
    return result.weights, correction_metrics(corrections, result)
