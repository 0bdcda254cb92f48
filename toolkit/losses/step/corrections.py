"""Corrections of the mismatch between the sampler and the trainer, applied to the items of a step.

Corrections between the old policy and the sampler are known before the first forward ("early"), so rejected tokens can
leave the denominators of all ranks. Those with the current policy are applied in the forward ("late"), unless the items
have `current_logprobs`.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from toolkit.functional.mismatch import (
    Corrected,
    Correction,
    MismatchTerms,
    corrected,
    normalizer_parts,
)
from toolkit.functional.mismatch_metrics import correction_metrics, mismatch_metrics
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.step.step import Step
from toolkit.metrics import Mean, Metric


@dataclass(frozen=True)
class CorrectedBatch:
    """A micro-batch after the corrections that are known before the forward."""

    labels: Tensor
    """[B, T] labels, ignored where a token left the denominator."""
    importance: Tensor | None
    """[B, T] float64 factor of the corrected terms, 0 where rejected; None: 1 everywhere."""
    metrics: dict[str, Metric]


class EarlyCorrections:
    """The corrections of a step that are known before its first forward, over the micro-batches of this rank."""

    def __init__(self, step: Step, turns: Sequence[Tensor] | None, cfg: BaseRLLossConfig, *, has_current: bool) -> None:
        self._cfg: BaseRLLossConfig = cfg
        self._items: list[RLLossContextInputItem] = step.items
        self._chosen = tuple(correction for correction in cfg.correction if has_current or not correction.needs_current)
        turns_of_batches = [None] * len(step.items) if turns is None else turns
        self._scored = [_mismatch_terms(step, index, turn_ids, cfg) for index, turn_ids in enumerate(turns_of_batches)]

    def normalizer_parts(self) -> Tensor:
        """Return what this rank adds to the mean weights of the step, [C, 2]; C includes the late corrections."""
        device = self._items[0].shifted_labels.device if self._items else None
        parts = torch.zeros(len(self._cfg.correction), 2, dtype=torch.float64, device=device)
        for scored in self._scored:
            if scored is not None and self._chosen:
                _, terms, is_missing = scored
                reported = terms if is_missing is None else _reported(terms, ~is_missing)
                parts[: len(self._chosen)] += normalizer_parts(self._chosen, reported)
        return parts

    def labels(self) -> list[Tensor]:
        """Return the labels of each micro-batch, [B, T], ignored where a token left the denominator; needs no sums."""
        if not self._chosen and self._cfg.missing_rollout == "refuse":
            return [item.shifted_labels for item in self._items]
        sums = torch.ones(len(self._chosen), 2, dtype=torch.float64)
        return [self.batch(index, sums).labels for index in range(len(self._items))]

    def batch(self, index: int, normalizer_sums: Tensor | None) -> CorrectedBatch:
        """Return the micro-batch of an index after the corrections.

        `normalizer_sums` [C, 2] are the `normalizer_parts` of all ranks; ones: no weight is divided by a mean; None:
        the loss has no correction.
        """
        item, scored, corrections = self._items[index], self._scored[index], self._chosen
        labels = item.shifted_labels
        if scored is None:
            return self._without_missing(item, CorrectedBatch(labels, None, {}))
        positions, terms, is_missing = scored
        if corrections and normalizer_sums is not None:
            result = _corrected(corrections, terms, is_missing, normalizer_sums)
        else:
            ones = torch.ones_like(terms.rollout_logprobs, dtype=torch.float64)
            result = Corrected(weights=ones, is_kept=ones.bool(), in_denominator=ones.bool(), is_hit=())
        assert terms.old_logprobs is not None
        metrics: dict[str, Metric] = {}
        if comparable_rollout(item, self._cfg) is not None:
            metrics = mismatch_metrics(
                terms.old_logprobs,
                terms.rollout_logprobs,
                result.weights,
                result.is_kept,
                terms.sequence_ids,
                terms.num_sequences,
            )
        if not corrections:
            return self._without_missing(item, CorrectedBatch(labels, None, metrics))
        metrics |= correction_metrics(corrections, result)
        flat = torch.ones(labels.numel(), dtype=torch.float64, device=labels.device)
        weight = flat.index_copy(0, positions, result.weights).reshape(labels.shape)
        has_left = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        has_left[positions] = ~result.in_denominator
        kept_labels = labels.masked_fill(has_left.reshape(labels.shape), self._cfg.ignore_idx)
        return self._without_missing(item, CorrectedBatch(kept_labels, weight, metrics))

    def _without_missing(self, item: RLLossContextInputItem, batch: CorrectedBatch) -> CorrectedBatch:
        """Return a micro-batch in which tokens that the sampler did not report are rejected, if so configured."""
        is_missing = missing_rollout(item.rollout_logprobs, self._cfg)
        if is_missing is None:
            return batch
        is_scored = item.shifted_labels != self._cfg.ignore_idx
        is_missing = is_missing & is_scored
        weight = torch.ones_like(is_missing, dtype=torch.float64) if batch.importance is None else batch.importance
        labels = batch.labels
        if _survivors_alone(self._cfg.correction):
            labels = labels.masked_fill(is_missing, self._cfg.ignore_idx)
        counted = {"rollout_missing": Mean.share(is_missing, is_scored)}
        return CorrectedBatch(labels, weight.masked_fill(is_missing, 0.0), {**batch.metrics, **counted})


def missing_rollout(rollout_logprobs: Tensor | None, cfg: BaseRLLossConfig) -> Tensor | None:
    """Return where `rollout_logprobs` [...] are not reported, bool; None where the config rejects no such tokens."""
    if rollout_logprobs is None or cfg.missing_rollout == "refuse":
        return None
    return ~rollout_logprobs.isfinite()


def _survivors_alone(corrections: Sequence[Correction]) -> bool:
    """Whether rejected tokens leave the denominator."""
    return any(correction.denominator == "survivors" for correction in corrections)


def _reported(terms: MismatchTerms, is_reported: Tensor) -> MismatchTerms:
    """Return the terms of the tokens that the sampler reported, [N] bool; the others are in no statistic."""
    values = {field.name: getattr(terms, field.name) for field in fields(terms)}
    chosen: dict[str, Any] = {name: each[is_reported] for name, each in values.items() if isinstance(each, Tensor)}
    return replace(terms, **chosen)


def _corrected(
    corrections: Sequence[Correction],
    terms: MismatchTerms,
    is_missing: Tensor | None,
    normalizer_sums: Tensor | None = None,
) -> Corrected:
    """Return `functional.mismatch.corrected`, with the tokens `is_missing` [N] rejected."""
    if is_missing is None:
        return corrected(corrections, terms, normalizer_sums)
    result = corrected(corrections, _reported(terms, ~is_missing), normalizer_sums)

    def spread(values: Tensor, at_missing: bool = False) -> Tensor:
        return torch.full_like(is_missing, at_missing, dtype=values.dtype).masked_scatter(~is_missing, values)

    return Corrected(
        weights=spread(result.weights),
        is_kept=spread(result.is_kept),
        in_denominator=spread(result.in_denominator, not _survivors_alone(corrections)),
        is_hit=tuple(map(spread, result.is_hit)),
    )


def comparable_rollout(item: RLLossContextInputItem, cfg: BaseRLLossConfig) -> Tensor | None:
    """Return the sampler's log-probabilities [B, T]; None if of another distribution, which metrics skip, too."""
    spec = item.rollout_spec
    is_other = spec is not None and spec.mismatch(cfg.temperature) is not None and not cfg.accept_mismatch
    return None if is_other else item.rollout_logprobs


def _mismatch_terms(
    step: Step, index: int, turns: Tensor | None, cfg: BaseRLLossConfig
) -> tuple[Tensor, MismatchTerms, Tensor | None] | None:
    """Return the positions of scored tokens, what corrections look at, and which are not reported (None: no matter).

    None if nothing can be compared.
    """
    item: RLLossContextInputItem = step.items[index]
    old = item.current_logprobs if item.old_logprobs is None else item.old_logprobs
    rollout = comparable_rollout(item, cfg)
    if old is None or (rollout is None and any("rollout" in correction.between for correction in cfg.correction)):
        return None
    if rollout is None and item.current_logprobs is None:
        return None
    assert item.advantages is not None
    ids = step.sequence_ids[index]
    positions = (item.shifted_labels != cfg.ignore_idx).reshape(-1).nonzero().squeeze(-1)

    def scored(values: Tensor) -> Tensor:
        return values.detach().reshape(-1).index_select(0, positions)

    terms = MismatchTerms(
        # Without a sampler only current and old are compared and no statistic reads this field.
        rollout_logprobs=scored(old if rollout is None else rollout),
        old_logprobs=scored(old),
        current_logprobs=None if item.current_logprobs is None else scored(item.current_logprobs),
        advantages=scored(item.advantages),
        sequence_ids=scored(ids),
        num_sequences=int(ids.max()) + 1 if ids.numel() else 0,
        turn_ids=None if turns is None else scored(turns),
        num_turns=int(turns.max()) + 1 if turns is not None and turns.numel() else 0,
    )
    return positions, terms, missing_rollout(terms.rollout_logprobs, cfg)


def late_correction(
    terms: PolicyTerms,
    cfg: BaseRLLossConfig,
    local_index: Tensor | None = None,
    is_missing: Tensor | None = None,
) -> tuple[Tensor | None, dict[str, Metric]]:
    """Apply the corrections that compare the current policy, which is known only in the forward.

    Args:
        terms: of N tokens.
        cfg: of the loss.
        local_index: [n] the tokens that the metrics are of; None: all.
        is_missing: [N] bool, the tokens that `missing_rollout` found.

    Returns:
        The weights [N], without gradient (None: 1 everywhere), and the metrics.
    """
    corrections = tuple(correction for correction in cfg.correction if correction.needs_current)
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
    result = _corrected(corrections, seen, is_missing)
    hits = result.is_hit if local_index is None else tuple(is_hit[local_index] for is_hit in result.is_hit)
    return result.weights, correction_metrics(corrections, replace(result, is_hit=hits))
