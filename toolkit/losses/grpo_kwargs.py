"""What a policy loss must know before the first forward of an optimizer step: corrections, weights, wider views.

Every rank counts its micro-batches, one exchange adds the counts up (`census`), and the weights follow. Under sequence
parallelism the items are made whole first and the kwargs are cut last (`shards`); nothing in between knows of it.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch, C corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Self

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from toolkit.functional.aggregation import Share
from toolkit.functional.segments import NO_SEQUENCE, segment_sum, turn_ids
from toolkit.losses.base import BaseLossKwargs
from toolkit.losses.calibration import (
    aggregated,
    calibrated,
    counts_here,
    counts_of,
    sequence_ids_of_batches,
)
from toolkit.losses.candidates import candidates_of
from toolkit.losses.census import Counts, Table, census
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.fields import PerToken
from toolkit.losses.groups import check_step, pieces_of_groups, prompts_of, tokens_of_prompts
from toolkit.losses.grpo_correction import CorrectedBatch, EarlyCorrections, comparable_rollout
from toolkit.losses.grpo_items import check_item, check_policy_loss_of, scope_of
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.shards import given_and_whole
from toolkit.losses.whole import emptied, with_whole
from toolkit.metrics import Max, Mean, Metric


class GRPOLossKwargs(BaseLossKwargs):
    """Everything the loss of one micro-batch needs; all fields [1, T] or [B, T]."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    policy_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Importance weight of the policy term, 0 where a correction rejected the token; None: 1 everywhere."""
    nll_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of the negative log-likelihood of tokens with A > 0."""
    other_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of the KL and entropy terms under ``per_component``, a mean over all tokens; None: that of the
    policy loss."""
    candidate_ids: Annotated[Tensor | None, PerToken(pad=-1, trailing=1)] = None
    """[.., T, K] tokens whose log-probabilities are compared with another policy's; None: the whole vocabulary."""
    candidate_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None
    """[.., T, K] the reference's or the teacher's."""
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    teacher_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    current_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    sequence_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    turn_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    positions: Annotated[Tensor | None, PerToken(pad=0)] = None
    step_metrics: Any = None
    """Metrics that are known before the forward; reported once, by the micro-batch as a whole."""
    has_current: bool = False
    """Whether all corrections were applied before the forward, for the items had `current_logprobs`."""
    num_scored: int | None = None
    """Tokens that a loss of more than one token must be given together; None: it may be given pieces."""
    place: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    """int64, where each scored token stands among those of `whole`."""
    whole: Any = None
    """A `Whole`: the tokens that the loss looks at, where others than this micro-batch's piece are among them."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor on `device`, those of `whole` included."""
        moved = super().to(device)
        return moved if self.whole is None else moved.replace(whole=self.whole.to(device))


@dataclass
class _Step:
    """The micro-batches of a step on this rank: what is counted here, and the kwargs once all ranks have counted."""

    checked: Callable[[], list[RLLossContextInputItem]]
    cfg: BaseRLLossConfig
    bounds: Sequence[Tensor | None] | None
    sp_mesh: DeviceMesh | None
    device: torch.device
    given: list[RLLossContextInputItem] = field(default_factory=list)
    items: list[RLLossContextInputItem] = field(default_factory=list)
    """Whole rows, also where this rank was given pieces."""
    candidates: list[tuple[Tensor | None, Tensor | None]] = field(default_factory=list)

    @property
    def num_terms(self) -> int:
        return 1 + bool(self.cfg.positive_nll_coef) + self.has_other_weight

    @property
    def has_other_weight(self) -> bool:
        cfg = self.cfg
        return cfg.aggregation.name == "per_component" and (cfg.use_kl_loss or cfg.entropy_coef != 0)

    def count(self) -> Counts:
        """Check the items and count what their weights will be divided by."""
        cfg = self.cfg
        self.given, self.items = given_and_whole(self.checked, self.sp_mesh)
        for index, item in enumerate(self.items):
            check_item(item, cfg, f"data_batches[{index}]")
        self.candidates = [candidates_of(item, cfg, f"data_batches[{i}]") for i, item in enumerate(self.given)]
        labels = [item.shifted_labels for item in self.items]
        self.ids = sequence_ids_of_batches(labels, self.bounds, ignore_idx=cfg.ignore_idx)
        self.turns = [turn_ids(own != cfg.ignore_idx, ids) for own, ids in zip(labels, self.ids, strict=True)]
        with_current = sum(item.current_logprobs is not None for item in self.items)
        self.corrections = EarlyCorrections(
            self.items, self.ids, self.turns, cfg, has_current=with_current == len(self.items) > 0
        )
        self.labels = self.corrections.labels()
        self.shares = [[] if cfg.aggregation.name == "prompt_mean" else self._shares()]
        if cfg.positive_nll_coef:
            self.shares.append(self._positive_shares())
        if self.has_other_weight:
            self.shares.append(aggregated(self.labels, self.ids, "token_mean", ignore_idx=cfg.ignore_idx))
        num_scored = sum(bool((own != cfg.ignore_idx).any()) for own in labels)
        heads = torch.tensor([len(self.items), with_current, num_scored], dtype=torch.float64, device=self.device)
        sums = [counts_of(own, self.device) for own in self.shares]
        numbers = torch.cat([heads, *sums, self.corrections.normalizer_parts(self.device).flatten()])
        own = Counts(numbers, self._tables())
        return own if counts_here(self.sp_mesh) else own.uncounted()

    def _tables(self) -> dict[str, Table]:
        found: dict[str, Table] = {}
        if self.cfg.aggregation.name == "prompt_mean":
            found["tokens"] = tokens_of_prompts(self.labels, self._groups(), ignore_idx=self.cfg.ignore_idx)
        if scope_of(self.cfg) == "group":
            found["pieces"] = pieces_of_groups(
                [item.shifted_labels for item in self.items], self._groups(), ignore_idx=self.cfg.ignore_idx
            )
        return found

    def _groups(self) -> list[Tensor]:
        return [item.group_ids for item in self.items if item.group_ids is not None]

    def _shares(self, **prompts: Any) -> list[Share]:
        chosen = self.cfg.aggregation
        options: dict[str, Any] = {"count_empty": chosen.count_empty, "length": chosen.length, **prompts}
        if self.bounds is not None:  # empty sequences leave no trace in the ids
            options["num_sequences"] = [
                len(bounds) - 1 if bounds is not None else len(own_ids) if own_ids.dim() > 1 else 1
                for own_ids, bounds in zip(self.ids, self.bounds, strict=True)
            ]
        if chosen.name == "per_component":
            options["is_positive"] = [_given(item.advantages) > 0 for item in self.items]
            options["component_weights"] = (chosen.positive_weight, chosen.negative_weight)
        return aggregated(self.labels, self.ids, chosen.name, ignore_idx=self.cfg.ignore_idx, **options)

    def _positive_shares(self) -> list[Share]:
        """Return the shares of a mean over the tokens with A > 0."""
        positive = [
            own.masked_fill(~(_given(item.advantages) > 0), self.cfg.ignore_idx)
            for item, own in zip(self.items, self.labels, strict=True)
        ]
        return aggregated(positive, self.ids, "token_mean", ignore_idx=self.cfg.ignore_idx)

    def kwargs(self, total: Counts) -> list[GRPOLossKwargs]:
        """Return the kwargs of every micro-batch from what all ranks counted together."""
        cfg = self.cfg
        num_items, with_current, num_scored = (int(number) for number in total.numbers[:3].tolist())
        has_current = with_current == num_items > 0
        check_step(self.items, cfg, total, num_items=num_items, num_with_current=with_current, num_scored=num_scored)
        sums = total.numbers[3 : 3 + 2 * self.num_terms].reshape(self.num_terms, 2)
        if cfg.aggregation.name == "prompt_mean":
            tokens, num_prompts = prompts_of(self._groups(), total.tables["tokens"], cfg.aggregation.count_empty)
            self.shares[0] = self._shares(prompt_tokens=tokens)
            sums = sums.clone()
            sums[0, 0] = num_prompts
        weights = [
            calibrated(own, own_sums, gradient_reduction=cfg.gradient_reduction)
            for own, own_sums in zip(self.shares, sums, strict=True)
        ]
        batches = self.corrections.batches(total.numbers[3 + 2 * self.num_terms :].reshape(-1, 2))
        denominators = torch.ones_like(sums[0]) if cfg.aggregation.name == "token_sum" else sums[0]
        step_metrics = {
            **_step_metrics(self.items, self.labels, self.ids, cfg.ignore_idx),
            **_denominators(denominators, cfg),
        }
        found = [
            self._kwargs_of(index, batch, [own[index] for own in weights], step_metrics, has_current=has_current)
            for index, batch in enumerate(batches)
        ]
        found = with_whole(found, cfg, self.sp_mesh, is_step_wide=has_current and scope_of(cfg) in ("group", "batch"))
        if self.sp_mesh is not None:
            found = [own.sp_split(self.sp_mesh, ignore_idx=cfg.ignore_idx) for own in found]
        return [
            own.replace(candidate_ids=ids, candidate_logprobs=logprobs, num_scored=self._num_scored(own))
            for own, (ids, logprobs) in zip(found, self.candidates, strict=True)
        ]

    def _num_scored(self, own: GRPOLossKwargs) -> int | None:
        may_be_cut = scope_of(self.cfg) == "token" or (own.whole is not None and own.whole.sp_mesh is None)
        return None if may_be_cut else int((own.shifted_labels != self.cfg.ignore_idx).sum())

    def _kwargs_of(
        self,
        index: int,
        batch: CorrectedBatch,
        weights: list[Tensor],
        step_metrics: dict[str, Metric],
        *,
        has_current: bool,
    ) -> GRPOLossKwargs:
        item, cfg, scope = self.items[index], self.cfg, scope_of(self.cfg)
        loss_weight, *more = weights
        metrics = {**batch.metrics, **(step_metrics if index == 0 else {})}
        return GRPOLossKwargs(
            shifted_labels=batch.labels,
            loss_weight=loss_weight,
            nll_weight=more[0] if cfg.positive_nll_coef else None,
            other_weight=more[-1] if self.has_other_weight else None,
            policy_weight=batch.policy_weight,
            advantages=_given(item.advantages),
            old_logprobs=item.old_logprobs,
            ref_logprobs=item.ref_logprobs,
            rollout_logprobs=comparable_rollout(item, cfg),
            teacher_logprobs=item.teacher_logprobs,
            current_logprobs=item.current_logprobs if has_current and scope != "token" else None,
            sequence_ids=self.ids[index],
            turn_ids=self.turns[index] if scope != "token" else None,
            group_ids=item.group_ids if scope in ("group", "batch") else None,
            positions=_positions(batch.labels) if scope != "token" else None,
            step_metrics=metrics if counts_here(self.sp_mesh) else emptied(metrics),
            has_current=has_current,
        )


def build_grpo_kwargs(
    checked: Callable[[], list[RLLossContextInputItem]],
    device: torch.device,
    cfg: BaseRLLossConfig,
    cu_seq_lens_list: Sequence[Tensor | None] | None,
    sp_mesh: DeviceMesh | None,
) -> list[GRPOLossKwargs]:
    """Check the items, apply the corrections and fix the weight of every token; see `BaseLossContext` for the rest.

    Args:
        checked: gives the items; what it raises reaches the other ranks, too.
        device: of the items.
        cfg: of the loss.
        cu_seq_lens_list: boundaries of packed rows.
        sp_mesh: ranks that share a sequence.
    """
    check_policy_loss_of(cfg)
    step = _Step(checked, cfg, cu_seq_lens_list, sp_mesh, device)
    total = census(
        step.count,
        num_numbers=3 + 2 * step.num_terms + 2 * len(cfg.correction),
        has_tables=cfg.aggregation.name == "prompt_mean" or scope_of(cfg) == "group",
        device=step.device,
    )
    return step.kwargs(total)


def _denominators(denominators: Tensor, cfg: BaseRLLossConfig) -> dict[str, Metric]:
    if cfg.aggregation.name == "per_component":
        return {"denominator_positive": Max(denominators[0]), "denominator_negative": Max(denominators[1])}
    return {"denominator": Max(denominators[0])}


def _step_metrics(
    items: Sequence[RLLossContextInputItem], labels: Sequence[Tensor], ids: Sequence[Tensor], ignore_idx: int
) -> dict[str, Metric]:
    """Return the tokens without an advantage, and the sequences that have none at all and teach nothing."""
    idle_tokens, idle_sequences = [], []
    for item, own, own_ids in zip(items, labels, ids, strict=True):
        is_scored = own != ignore_idx
        is_idle = _given(item.advantages)[is_scored] == 0
        names, sequences = own_ids[is_scored].unique(return_inverse=True)
        idle_tokens.append(is_idle)
        idle_sequences.append(segment_sum((~is_idle).double(), sequences, len(names)) == 0)
    return {
        "zero_advantage_tokens": Mean.of(torch.cat(idle_tokens or [torch.zeros(0)])),
        "zero_advantage_sequences": Mean.of(torch.cat(idle_sequences or [torch.zeros(0)])),
    }


def _given(advantages: Tensor | None) -> Tensor:
    assert advantages is not None  # checked with the items
    return advantages


def _positions(labels: Tensor) -> Tensor:
    return torch.arange(labels.shape[-1], device=labels.device).expand(labels.shape)
