"""What a policy loss adds to a step: checked items, corrections, wider views.

Legend: B rows, T positions of a row, N scored tokens of a micro-batch, C corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import world_size
from toolkit.functional.policy.registry import Scope
from toolkit.functional.segments import turn_ids
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.kwargs import GRPOLossKwargs
from toolkit.losses.step.candidates import candidates_of
from toolkit.losses.step.corrections import EarlyCorrections, comparable_rollout
from toolkit.losses.step.global_view import emptied, with_global_views
from toolkit.losses.step.groups import check_step, pieces_of_groups
from toolkit.losses.step.item_checks import check_item
from toolkit.losses.step.step import Extra, Step, StepRow, StepTotals
from toolkit.losses.step.weights import counts_here
from toolkit.metrics import Max, Mean, Metric, Metrics, deferred


@dataclass
class Prepared:
    """What is known about the items of this rank before the exchange."""

    scope: Scope
    """What the values of one token depend on."""
    corrections: EarlyCorrections
    turns: list[Tensor] | None
    """For each micro-batch the turn of each position, [B, T]; None: nothing looks at turns."""
    candidates: list[tuple[Tensor | None, Tensor | None]]
    """Ids and log-probabilities of this rank's shards."""
    micro_batches: tuple[int, int, int]
    """How many this rank has: all, those with `current_logprobs`, those with a scored token."""
    has_current: bool = False
    """Whether every item of all ranks has `current_logprobs`; known once all have counted."""


def counted_besides(cfg: BaseRLLossConfig) -> dict[str, int | None]:
    """Return what `prepare` counts; see `KwargsBuilder`."""
    micro_batches = {"micro_batches": 3} if world_size() > 1 else {}  # one rank knows its own without reading a tensor
    means = {"normalizers": 2 * len(cfg.correction)} if cfg.correction else {}
    tables = {"pieces": None} if cfg.scope == "group" else {}
    return {**micro_batches, **means, **tables}


def prepare(step: Step) -> Extra:
    """Check the items, apply the early corrections, and count; see `KwargsBuilder`."""
    cfg: BaseRLLossConfig = step.loss_cfg
    scope = cfg.scope
    for index, item in enumerate(step.items):
        check_item(item, cfg, f"data_batches[{index}]")
    candidates = [candidates_of(item, cfg, f"data_batches[{index}]") for index, item in enumerate(step.pieces)]
    labels = step.labels
    turns = None
    if scope != "token" or cfg.correction:
        turns = [turn_ids(each != cfg.ignore_idx, ids) for each, ids in zip(labels, step.sequence_ids, strict=True)]
    with_current = sum(item.current_logprobs is not None for item in step.items)
    corrections = EarlyCorrections(step, turns, cfg, has_current=with_current == len(step.items) > 0)
    step.labels = corrections.labels()
    # Only losses that look at several tokens need the number of micro-batches with a scored token.
    with_tokens = 0
    if scope != "token" and labels:
        with_tokens = int(torch.stack([(each != cfg.ignore_idx).any() for each in labels]).sum())
    micro_batches = (len(step.items), with_current, with_tokens)
    step.prepared = Prepared(scope, corrections, turns, candidates, micro_batches)
    counted: dict[str, Any] = {"micro_batches": micro_batches} if world_size() > 1 else {}
    if cfg.correction:
        counted["normalizers"] = corrections.normalizer_parts()
    if scope == "group":
        groups = [item.group_ids for item in step.items]
        counted["pieces"] = pieces_of_groups(labels, groups, ignore_idx=cfg.ignore_idx)
    return counted


def check_totals(step: Step) -> None:
    """Raise if a loss of several tokens cannot see all of them; see `KwargsBuilder`."""
    counted = _totals(step).numbers.get("micro_batches")
    numbers = step.prepared.micro_batches if counted is None else counted.tolist()  # waits for the device once
    num_items, num_with_current, num_scored = map(int, numbers)
    check_step(
        step.items,
        step.loss_cfg,
        _totals(step).tables.get("pieces", {}),
        num_items=num_items,
        num_with_current=num_with_current,
        num_scored=num_scored,
    )
    step.prepared.has_current = num_with_current == num_items > 0


def fields_of(row: StepRow) -> dict[str, Any]:
    """Return the kwargs of a micro-batch that its item lacks, or whose value replaces that of the item."""
    cfg = row.step.loss_cfg
    prepared: Prepared = row.step.prepared
    scope = prepared.scope
    sums = _totals(row.step).numbers["normalizers"].reshape(-1, 2) if cfg.correction else None
    batch = prepared.corrections.batch(row.index, sums)
    metrics: Metrics = batch.metrics
    if row.index == 0:
        measure = _step_metrics(row.step)
        metrics = deferred(lambda: {**batch.metrics, **measure()}, row.labels)
    if not counts_here(row.step.sp_mesh):
        metrics = emptied(metrics)
    is_wide = scope != "token"
    return {
        "importance": batch.importance,
        "rollout_logprobs": comparable_rollout(row.item, cfg),
        "current_logprobs": row.item.current_logprobs if prepared.has_current and is_wide else None,
        "turn_ids": prepared.turns[row.index] if is_wide and prepared.turns is not None else None,
        "group_ids": row.item.group_ids if scope in ("group", "batch") else None,
        "positions": _positions(row.labels) if is_wide else None,
        "step_metrics": metrics,
        "has_current": prepared.has_current,
    }


def with_wider_views(batches: list[GRPOLossKwargs], step: Step) -> list[GRPOLossKwargs]:
    """Return kwargs of whole rows with the other tokens that their loss looks at."""
    prepared: Prepared = step.prepared
    is_wide = prepared.scope != "token" and step.sp_mesh is not None
    is_step_wide = prepared.has_current and prepared.scope in ("group", "batch")
    return with_global_views(batches, step.loss_cfg, step.sp_mesh, is_wide=is_wide, is_step_wide=is_step_wide)


def with_local_candidates(batches: list[GRPOLossKwargs], step: Step) -> list[GRPOLossKwargs]:
    """Return this rank's kwargs with the candidates of its tokens, and how many tokens must stay together."""
    prepared: Prepared = step.prepared
    if step.loss_cfg.candidates is None and prepared.scope == "token":
        return batches
    return [
        batch.replace(candidate_ids=ids, candidate_logprobs=logprobs, num_scored=_num_scored(batch, step))
        for batch, (ids, logprobs) in zip(batches, prepared.candidates, strict=True)
    ]


def _num_scored(kwargs: GRPOLossKwargs, step: Step) -> int | None:
    is_of_tokens = step.prepared.scope == "token"
    may_be_cut = is_of_tokens or (kwargs.global_view is not None and kwargs.global_view.sp_mesh is None)
    return None if may_be_cut else int((kwargs.shifted_labels != step.ignore_idx).sum())


def _totals(step: Step) -> StepTotals:
    assert step.totals is not None  # counted before
    return step.totals


def _step_metrics(step: Step) -> Callable[[], dict[str, Metric]]:
    """Return a function that computes the denominators and the shares of what has only advantages of 0.

    It reads no item, since the caller may fill the tensors of items anew.
    """
    scored = step.is_scored
    idle = [is_scored & (item.advantages == 0) for item, is_scored in zip(step.items, scored, strict=True)]
    sequence_ids = None if step.cu_seq_lens_list is None else step.sequence_ids  # None: a row is a sequence
    denominators = _totals(step).denominators

    def measured() -> dict[str, Metric]:
        tokens, sequences = [], []
        for index, (is_idle, is_scored) in enumerate(zip(idle, scored, strict=True)):
            is_taught = is_scored ^ is_idle
            tokens.append(Mean.share(is_idle, is_scored))
            if sequence_ids is None:
                is_reached, is_there = is_taught.any(-1), is_scored.any(-1)
            else:
                ids = (sequence_ids[index] + 1).reshape(-1)  # 0: in no sequence
                is_reached, is_there = (ids.bincount(chosen.reshape(-1)) > 0 for chosen in (is_taught, is_scored))
            sequences.append(Mean.share(is_there ^ is_reached, is_there))
        return {
            "zero_advantage_tokens": _merged(tokens),
            "zero_advantage_sequences": _merged(sequences),
            **{
                name.replace("policy", "denominator", 1): Max(denominator)
                for name, denominator in denominators.items()
                if name.startswith("policy")
            },
        }

    return measured


def _merged(shares: Sequence[Mean]) -> Mean:
    return reduce(Mean.merge, shares) if shares else Mean.of(torch.zeros(0))


def _positions(labels: Tensor) -> Tensor:
    return torch.arange(labels.shape[-1], device=labels.device).expand(labels.shape)
