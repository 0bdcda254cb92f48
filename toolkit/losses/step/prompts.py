"""Prompts over micro-batches and ranks: how many scored tokens each has, for means by prompt.

Legend: B rows, T positions of a row. Group ids are the same number everywhere for completions of the same prompt;
negative ones without a scored token stand for padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.losses.step.totals import Table


def tokens_of_prompts(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return the scored tokens of every prompt in the micro-batches of this rank, prompts without any included."""
    found: Table = {}
    for own_labels, own_groups in zip(labels, group_ids, strict=True):
        groups, place = own_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.bincount(place, (own_labels.reshape(-1) != ignore_idx).double(), minlength=len(groups))
        for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            found[group] = found.get(group, 0.0) + size
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
