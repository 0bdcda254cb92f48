"""Groups that teach nothing are dropped, and replaced by those of further prompts, in a limited number of rounds.

Source: DAPO (Yu et al. 2025), arXiv 2503.14476, section 3.2 and algorithm 1. Two differences: a group is dropped if its
advantages are all 0, which is what equal rewards lead to in GRPO; and at the limit the step goes on with the groups it
has, where DAPO's code raises.

Legend: G groups of equal size, over all processes, in the order in which their prompts were drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from toolkit.errors import warn_once
from toolkit.functional.rewards import RewardTerms
from toolkit.metrics import Mean, Metric, Sum, merge_metrics
from toolkit.training.experience import Rows, joined_terms, selected_terms


@dataclass(frozen=True)
class Groups:
    """Completed and rewarded prompts."""

    rows: Rows
    """Of this process, with advantages; perhaps none."""
    owners: Tensor
    """[G] the process that has the rows of each group."""
    terms: RewardTerms
    """Of all processes."""
    size: int
    """Completions of each prompt."""

    def select(self, is_chosen: Tensor, rank: int) -> Groups:
        """Return some of the groups: `is_chosen` [G] bool is equal on all processes; `rank` is this process."""
        local = is_chosen[self.owners == rank].repeat_interleave(self.size).nonzero().squeeze(-1)
        return Groups(
            rows=self.rows.select(local.to(self.rows.input_ids.device)),
            owners=self.owners[is_chosen],
            terms=selected_terms(self.terms, is_chosen.repeat_interleave(self.size)),
            size=self.size,
        )

    def first(self, number: int, rank: int) -> Groups:
        """Return the first `number` groups, or all."""
        return self.select(torch.arange(len(self.owners)) < number, rank)

    @classmethod
    def joined(cls, parts: Sequence[Groups]) -> Groups:
        """Return the groups of several rounds, one after the other."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            rows=Rows.joined([part.rows for part in parts]),
            owners=torch.cat([part.owners for part in parts]),
            terms=joined_terms([part.terms for part in parts]),
            size=parts[0].size,
        )

    def with_advantages(self, advantages: Tensor, rank: int) -> Groups:
        """Return the groups with `advantages` of all completions, [G x size, 1] or [G x size, T - 1]."""
        labels = self.rows.shifted_labels
        local = advantages[(self.owners == rank).repeat_interleave(self.size), : labels.shape[1]]
        return replace(self, rows=replace(self.rows, advantages=local.to(labels.device).expand(labels.shape)))


@dataclass(frozen=True)
class Round:
    """One batch of prompts."""

    groups: Groups
    """Those that teach."""
    num_sampled: int
    """Groups that were sampled, over all processes."""
    metrics: dict[str, Metric]
    """Of all processes."""


def sample_rounds(
    sample: Callable[[int], Round], *, wanted: int, max_rounds: int, rank: int
) -> tuple[Groups, dict[str, Metric], int]:
    """Sample until `wanted` groups teach, at most `max_rounds` times; all processes call it together.

    Of the last round only the first groups are kept that are still wanted, in the order of their prompts.

    Args:
        sample: returns the round with this number, from 0.
        wanted: groups that a step is to learn from.
        max_rounds: the limit.
        rank: this process.

    Returns:
        the groups to learn from, metrics over all processes, and the number of rounds.
    """
    rounds: list[Round] = []
    missing = wanted
    while not rounds or (missing > 0 and len(rounds) < max_rounds):
        rounds.append(sample(len(rounds)))
        missing -= len(rounds[-1].groups.owners)
    kept = [each.groups for each in rounds]
    if missing < 0:
        kept[-1] = kept[-1].first(len(kept[-1].owners) + missing, rank)
    groups = Groups.joined(kept)
    metrics = merge_metrics([each.metrics for each in rounds])
    if max_rounds == 1:
        return groups, metrics, 1
    if missing > 0:
        warn_once(
            f"after rollout.max_sampling_rounds={max_rounds} fewer than {wanted} groups of a step had advantages other "
            "than 0; it goes on with those it has (metric learning_groups); raise it, or choose prompts that the "
            "policy solves sometimes"
        )
    num_sampled, num_kept = sum(each.num_sampled for each in rounds), len(groups.owners)
    metrics |= {
        "sampling_rounds": Mean.of(torch.tensor([float(len(rounds))])),
        "dropped_groups": Mean.of(torch.arange(num_sampled) >= num_kept),
        "learning_groups": Sum(torch.tensor(float(num_kept))),
    }
    return groups, metrics, len(rounds)
