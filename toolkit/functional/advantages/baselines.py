"""Rewards relative to a baseline that comes from outside the group. S: sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.advantages.registry import SequenceAdvantages, register_advantage
from toolkit.functional.options import Fraction

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms


@register_advantage("remax", needs=("greedy_rewards",), within_group=False, source="Li et al. 2023, arXiv 2310.10505")
def remax(r: RewardTerms) -> SequenceAdvantages:
    """Reward minus the reward of the greedy completion of the same prompt (ReMax).

    ``A = R - R_greedy``, 0 where the greedy reward is not known. One sample per prompt is enough, at the cost of one
    more generation each.
    """
    greedy = r.require("greedy_rewards")
    known = r.known & greedy.isfinite()
    return r.result((r.filled - greedy.to(r.wide)).where(known, 0.0), known)


@register_advantage("rae", needs=("baselines",), within_group=False, source="Liu et al. 2025, arXiv 2506.24119")
def rae(r: RewardTerms, *, decay: Fraction = 0.95) -> SequenceAdvantages:
    """Reward minus a moving average of the rewards before it (role-conditioned advantage estimation).

    ``A_i = R_i - b`` and then ``b = decay b + (1 - decay) R_i``, in the order of the sequences. Here a group is a
    set of sequences with one average, such as a role in a game; `rae_baselines` gives the averages for the next batch.

    Args:
        decay: decay factor of the average.
    """
    before, _ = _averages(r, decay)
    return r.result(r.filled - before)


def rae_baselines(r: RewardTerms, *, decay: float = 0.95) -> Tensor:
    """Return the moving average of each sequence's group after this batch, [S], equal within a group; see `rae`."""
    return _averages(r, decay)[1].to(r.require("baselines").dtype)


def _averages(r: RewardTerms, decay: float) -> tuple[Tensor, Tensor]:
    """Return the average before each sequence, and that of its group after the batch, [S] each."""
    average = r.require("baselines").to(r.wide)
    before = average.clone()
    indices = r.index_in_group
    for index in range(int(indices.max()) + 1 if len(indices) else 0):
        is_current = indices == index
        before = average.where(is_current, before)
        step = (decay * average + (1 - decay) * r.filled).where(is_current & r.known, 0.0)
        is_moved = r.total((is_current & r.known).to(r.wide)) > 0
        average = r.total(step).where(is_moved, average)
    return before, average
