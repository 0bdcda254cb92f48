"""Prompts and groups over micro-batches and ranks: who has how many tokens, and whether a step holds what a loss needs.

Legend: B rows, T positions of a row. Group ids are the same number everywhere for completions of the same prompt;
negative ones without a scored token stand for padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.census import Counts, Table
from toolkit.losses.config import BaseRLLossConfig
from toolkit.losses.grpo_items import scope_of
from toolkit.losses.items import RLLossContextInputItem


def tokens_of_prompts(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return the scored tokens of every prompt in the micro-batches of this rank, prompts without any included."""
    found: Table = {}
    for own_labels, own_groups in zip(labels, group_ids, strict=True):
        groups, place = own_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.bincount(place, (own_labels.reshape(-1) != ignore_idx).double(), minlength=len(groups))
        for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            found[group] = found.get(group, 0.0) + size
    return found


def pieces_of_groups(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return in how many micro-batches of this rank each group has a scored token."""
    found: Table = {}
    for own_labels, own_groups in zip(labels, group_ids, strict=True):
        for group in own_groups[own_labels != ignore_idx].unique().tolist():
            found[group] = found.get(group, 0.0) + 1
    return found


def prompts_of(group_ids: Sequence[Tensor], tokens: Table, count_empty: bool) -> tuple[list[Tensor], int]:
    """Return for each micro-batch the tokens of each position's prompt over the step ([B, T]), and how many count.

    Args:
        group_ids: of the micro-batches of this rank.
        tokens: of every prompt, over all ranks.
        count_empty: whether prompts without a scored token count.
    """
    found = []
    for own in group_ids:
        groups, place = own.reshape(-1).unique(return_inverse=True)
        sizes = torch.tensor([tokens[group] for group in groups.tolist()], dtype=torch.float64, device=place.device)
        found.append(sizes[place].reshape(own.shape))
    # A negative number without a scored token is the padding of a row; with one it is a prompt like any other.
    return found, sum(size > 0 or (count_empty and group >= 0) for group, size in tokens.items())


def check_step(
    items: Sequence[RLLossContextInputItem],
    cfg: BaseRLLossConfig,
    total: Counts,
    *,
    num_items: int,
    num_with_current: int,
    num_scored: int,
) -> None:
    """Raise, on every rank, if a loss of the whole step cannot see it.

    Args:
        items: of this rank.
        cfg: of the loss.
        total: what all ranks counted.
        num_items: micro-batches of all ranks.
        num_with_current: those that have `current_logprobs`.
        num_scored: those that have a scored token.

    Raises:
        DataError: says what is cut apart and that `current_logprobs` mend it.
    """
    remedy = (
        "give every item current_logprobs, the log-probabilities of a forward without gradient before the step (then "
        "it may be cut anywhere)"
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
    scope, name = scope_of(cfg), cfg.policy_loss_cfg["loss_type"]
    if scope == "batch" and num_scored > 1:
        raise DataError(
            f"policy loss {name!r} takes statistics of the whole batch, which the {num_scored} micro-batches of this "
            f"step (over all ranks) cut apart; {remedy}, or use one micro-batch"
        )
    split = min((group for group, pieces in total.tables.get("pieces", {}).items() if pieces > 1), default=None)
    if split is not None:
        mine = [i for i, own in enumerate(items) if own.group_ids is not None and bool((own.group_ids == split).any())]
        where = f"data_batches[{mine[-1]}].group_ids: " if mine else ""
        raise DataError(
            f"{where}group {split} lies in several micro-batches, but policy loss {name!r} needs all sequences of a "
            f"group in one; split the batch between groups, or {remedy}"
        )
