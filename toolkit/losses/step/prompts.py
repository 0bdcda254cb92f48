"""Prompts over micro-batches and ranks: the number of scored tokens of each, for means by prompt.

Legend: B rows, T positions of a row. Completions of the same prompt have the same group id on all ranks; a negative id
without a scored token marks padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.losses.step.totals import Table


def tokens_of_prompts(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return the number of scored tokens of every prompt on this rank, including prompts without any.

    `labels` and `group_ids` are [B, T] for each micro-batch.
    """
    tokens: Table = {}
    for batch_labels, batch_groups in zip(labels, group_ids, strict=True):
        groups, index = batch_groups.reshape(-1).unique(return_inverse=True)
        sizes = torch.bincount(index, (batch_labels.reshape(-1) != ignore_idx).double(), minlength=len(groups))
        for group, size in zip(groups.tolist(), sizes.tolist(), strict=True):
            tokens[group] = tokens.get(group, 0.0) + size
    return tokens


def prompts_of(group_ids: Sequence[Tensor], tokens: Table, count_empty: bool) -> tuple[list[Tensor], int]:
    """Return the tokens of each position's prompt over the step ([B, T] per micro-batch), and how many prompts count.

    Args:
        group_ids: [B, T] for each micro-batch of this rank.
        tokens: number of scored tokens of every prompt, over all ranks.
        count_empty: whether prompts without a scored token count.
    """
    prompt_tokens = []
    for ids in group_ids:
        groups, index = ids.reshape(-1).unique(return_inverse=True)
        sizes = torch.tensor([tokens[group] for group in groups.tolist()], dtype=torch.float64, device=index.device)
        prompt_tokens.append(sizes[index].reshape(ids.shape))
    # A negative id without a scored token is the padding of a row; with one it is a prompt like any other.
    return prompt_tokens, sum(size > 0 or (count_empty and group >= 0) for group, size in tokens.items())
