"""Groups over micro-batches and ranks: whether a step holds together what a loss needs.

Legend: B rows, T positions of a row. Group ids are the same number everywhere for completions of the same prompt;
negative ones without a scored token stand for padding.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.config.policy import BaseRLLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.losses.step.totals import Table


def pieces_of_groups(labels: Sequence[Tensor], group_ids: Sequence[Tensor], *, ignore_idx: int) -> Table:
    """Return in how many micro-batches of this rank each group has a scored token."""
    found: Table = {}
    for own_labels, own_groups in zip(labels, group_ids, strict=True):
        for group in own_groups[own_labels != ignore_idx].unique().tolist():
            found[group] = found.get(group, 0.0) + 1
    return found


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
        pieces: in how many micro-batches of all ranks each group has a scored token.
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
    scope, name = cfg.scope, cfg.policy.name
    if scope == "batch" and num_scored > 1:
        raise DataError(
            f"policy loss {name!r} takes statistics of the whole batch, which the {num_scored} micro-batches of this "
            f"step (over all ranks) cut apart; {remedy}, or use one micro-batch"
        )
    split = min((group for group, number in pieces.items() if number > 1), default=None)
    if split is not None:
        mine = [i for i, own in enumerate(items) if own.group_ids is not None and bool((own.group_ids == split).any())]
        where = f"data_batches[{mine[-1]}].group_ids: " if mine else ""
        raise DataError(
            f"{where}group {split} lies in several micro-batches, but policy loss {name!r} needs all sequences of a "
            f"group in one; split the batch between groups, or {remedy}"
        )
