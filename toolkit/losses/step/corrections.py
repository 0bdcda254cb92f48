"""Corrections of the mismatch between the sampler and the trainer, applied to the items of a step.

Corrections between the old policy and the sampler are known before the first forward ("early"), so rejected tokens can
leave the denominators of all ranks. Those with the current policy are applied in the forward ("late"), unless the items
have `current_logprobs`.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.functional.mismatch import (
    Corrected,
    MismatchTerms,
    corrected,
    correction_metrics,
    mismatch_metrics,
    normalizer_parts,
)
from toolkit.functional.terms import PolicyTerms
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.step.step import Step
from toolkit.metrics import Metric


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
                parts[: len(self._chosen)] += normalizer_parts(self._chosen, scored[1])
        return parts

    def labels(self) -> list[Tensor]:
        """Return the labels of each micro-batch, [B, T], ignored where a token left the denominator; needs no sums."""
        if not self._chosen:
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
            return CorrectedBatch(labels, None, {})
        positions, terms = scored
        if corrections and normalizer_sums is not None:
            result = corrected(corrections, terms, normalizer_sums)
        else:
            ones = torch.ones_like(terms.rollout_logprobs)
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
            return CorrectedBatch(labels, None, metrics)
        metrics |= correction_metrics(corrections, result)
        flat = torch.ones(labels.numel(), dtype=torch.float64, device=labels.device)
        weight = flat.index_copy(0, positions, result.weights).reshape(labels.shape)
        has_left = torch.zeros(labels.numel(), dtype=torch.bool, device=labels.device)
        has_left[positions] = ~result.in_denominator
        kept_labels = labels.masked_fill(has_left.reshape(labels.shape), self._cfg.ignore_idx)
        return CorrectedBatch(kept_labels, weight, metrics)


def comparable_rollout(item: RLLossContextInputItem, cfg: BaseRLLossConfig) -> Tensor | None:
    """Return the sampler's log-probabilities [B, T]; None if of another distribution, which metrics skip, too."""
    spec = item.rollout_spec
    is_other = spec is not None and spec.mismatch(cfg.temperature) is not None and not cfg.accept_mismatch
    return None if is_other else item.rollout_logprobs


def _mismatch_terms(
    step: Step, index: int, turns: Tensor | None, cfg: BaseRLLossConfig
) -> tuple[Tensor, MismatchTerms] | None:
    """Return the positions of scored tokens and what corrections look at; None if nothing can be compared."""
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

    return positions, MismatchTerms(
        # Without a sampler only current and old are compared and no statistic reads this field.
        rollout_logprobs=scored(old if rollout is None else rollout).double(),
        old_logprobs=scored(old).double(),
        current_logprobs=None if item.current_logprobs is None else scored(item.current_logprobs).double(),
        advantages=scored(item.advantages),
        sequence_ids=scored(ids),
        num_sequences=int(ids.max()) + 1 if ids.numel() else 0,
        turn_ids=None if turns is None else scored(turns),
        num_turns=int(turns.max()) + 1 if turns is not None and turns.numel() else 0,
    )


def late_correction(
    terms: PolicyTerms, cfg: BaseRLLossConfig, local_index: Tensor | None = None
) -> tuple[Tensor | None, dict[str, Metric]]:
    """Apply the corrections that compare the current policy, which is known only in the forward.

    Returns:
        The weights [N] of `terms`, without gradient (None: 1 everywhere), and metrics of the tokens `local_index` [n]
        (None: all).
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
    result = corrected(corrections, seen)
    hits = result.is_hit if local_index is None else tuple(is_hit[local_index] for is_hit in result.is_hit)
    return result.weights, correction_metrics(corrections, replace(result, is_hit=hits))
