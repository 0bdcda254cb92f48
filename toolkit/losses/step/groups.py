"""Prompts over micro-batches and ranks: their tokens, and checks that a step keeps those together that a loss needs.

Legend: B rows, T positions of a row. Completions of the same prompt have the same group id on all ranks; a negative id
without a scored token marks padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.step.totals import Table


def pieces_of_groups(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return in how many micro-batches of this rank, `labels` and `group_ids` [B, T], each group has a scored token."""
    pieces: Table = {}
    for batch_labels, batch_groups in zip(labels, group_ids, strict=True):
        for group in batch_groups[batch_labels != ignore_idx].unique().tolist():
            pieces[group] = pieces.get(group, 0.0) + 1
    return pieces


def check_step(
    items: Sequence[RLLossContextInputItem],
    cfg: BaseRLLossConfig,
    pieces: Table,
    *,
    num_items: int,
    num_with_current: int,
    num_scored: int,
) -> None:
    """Raise, on every rank, if a loss of the whole step cannot see it.

    Args:
        items: of this rank.
        cfg: of the loss.
        pieces: the sum of `pieces_of_groups` over all ranks.
        num_items: micro-batches of all ranks.
        num_with_current: those that have `current_logprobs`.
        num_scored: those that have a scored token.

    Raises:
        DataError: names the split group and suggests `current_logprobs`.
    """
    remedy = (
        "give every item current_logprobs, the log-probabilities of a forward without gradient before the step (then "
        "the step may be split anywhere)"
    )
    if num_with_current not in (0, num_items):
        raise DataError(
            f"{num_with_current} of {num_items} micro-batches have current_logprobs; give them to all or none"
        )
    if num_with_current:
        return
    if cfg.needs_current_first:
        raise DataError(
            "a correction with between='current_...' and denominator='survivors' or normalize=True must know the "
            f"current policy before the first forward of the step; {remedy}, or use denominator='original'"
        )
    if num_scored > 1 and cfg.scope == "batch":
        raise DataError(
            f"policy loss {cfg.policy.name!r} takes statistics of the whole batch, but this step has {num_scored} "
            f"micro-batches (over all ranks); {remedy}, or use one micro-batch"
        )
    split = min((group for group, number in pieces.items() if number > 1), default=None)
    if split is not None:
        groups = [item.group_ids for item in items]
        indices = [i for i, ids in enumerate(groups) if ids is not None and bool((ids == split).any())]
        where = f"data_batches[{indices[-1]}].group_ids: " if indices else ""
        raise DataError(
            f"{where}group {split} is in several micro-batches, but policy loss {cfg.policy.name!r} needs all "
            f"sequences of a group in one; split the batch between groups, or {remedy}"
        )


def tokens_of_prompts(is_counted: Sequence[Tensor], group_ids: Sequence[Tensor]) -> Table:
    """Return the tokens of every prompt in the micro-batches of this rank; `is_counted` and `group_ids` are [B, T]."""
    tokens: Table = {}
    for is_active, batch_groups in zip(is_counted, group_ids, strict=True):
        groups, index = batch_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.bincount(index, is_active.reshape(-1).double(), minlength=len(groups))
        for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            tokens[group] = tokens.get(group, 0.0) + size
    return tokens


def prompts_of(group_ids: Sequence[Tensor], tokens: Table, count_empty: bool) -> tuple[list[Tensor], int]:
    """Return the tokens of each position's prompt over the step ([B, T] per micro-batch), and how many prompts count.

    `group_ids` are [B, T] for each micro-batch of this rank, `tokens` the sum of `tokens_of_prompts` over all ranks.
    """
    prompt_tokens = []
    for ids in group_ids:
        groups, index = ids.reshape(-1).unique(return_inverse=True)
        sizes = torch.tensor([tokens[group] for group in groups.tolist()], dtype=torch.float64, device=index.device)
        prompt_tokens.append(sizes[index].reshape(ids.shape))
    # A negative id without a scored token is the padding of a row; with one it is a prompt like any other.
    return prompt_tokens, sum(size > 0 or (count_empty and group >= 0) for group, size in tokens.items())
