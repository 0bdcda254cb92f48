"""Rewards in the place of advantages: an estimator compares them, over all batches of a step together.

Legend: B rows, T positions that have hidden states, S sequences of all batches together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from toolkit.distributed import world_size
from toolkit.errors import DataError, a_type, warn_once
from toolkit.functional.advantages import Advantage
from toolkit.functional.advantages import advantage as estimator_named
from toolkit.functional.rewards import RewardTerms
from toolkit.functional.segments import sequence_ids
from toolkit.runner.arguments import as_tensor

COMPARED = 8
"""Tokens before the completion that tell prompts apart."""
DEFAULT = "grpo"
"""The estimator of a call that names none."""


@dataclass(frozen=True)
class Sequences:
    """The sequences of one batch: which of them each position belongs to, and which positions are scored."""

    index: Tensor
    """[B, T] int64, the sequence of each position, counted within the batch."""
    is_scored: Tensor
    """[B, T] bool."""
    number: int

    @classmethod
    def of(cls, labels: Tensor, cu_seq_lens: Tensor | None, ignore_idx: int) -> Sequences:
        """Return the sequences of shifted `labels` [B, T]: its rows, or those of a packed row, cut at `cu_seq_lens`."""
        rows = labels if labels.dim() == 2 else labels.unsqueeze(0)
        if cu_seq_lens is not None:
            index = sequence_ids(labels.shape, cu_seq_lens, labels.device).reshape(rows.shape)
            return cls(index.clamp(min=0), (rows != ignore_idx) & (index >= 0), len(cu_seq_lens) - 1)
        index = torch.arange(len(rows), device=labels.device).unsqueeze(-1).expand_as(rows)
        return cls(index, rows != ignore_idx, len(rows))

    def by_sequence(self, values: Tensor, width: int, pad: float) -> Tensor:
        """Return `values` [B, T] as [number, `width`], the positions of a sequence where they are in its row."""
        result = values.new_full((self.number, width), pad)
        columns = torch.arange(values.shape[1], device=values.device).expand_as(self.index)
        result[self.index[self.is_scored], columns[self.is_scored]] = values[self.is_scored]
        return result

    def spread(self, values: Tensor) -> Tensor:
        """Return `values` [number], one for each sequence, or [number, >= T], for each of its positions, as [B, T]."""
        if values.dim() == 1:
            return values[self.index]
        columns = torch.arange(self.index.shape[1], device=values.device).expand_as(self.index)
        return values[self.index, columns]


def advantages_of(
    batches: Sequence[Mapping[str, Any]],
    sequences: Sequence[Sequences],
    advantage: Any,
    options: Any,
    *,
    is_first: bool,
) -> list[Tensor]:
    """Return the advantages of each batch, [B, T], from its rewards.

    Args:
        batches: the fields of each, with ``rewards`` and ``group_ids``, one number for each sequence.
        sequences: of each batch.
        advantage: the name of a registered estimator, or the estimator.
        options: of that estimator, by name; None: its defaults.
        is_first: whether to warn of groups that were probably not meant.

    Raises:
        DataError: a field is missing, has the wrong length or is not finite; or the estimator needs what a batch does
            not have.
        ConfigError: there is no such estimator, or an option is wrong.
    """
    if not isinstance(advantage, (Advantage, str)):
        raise DataError(f"advantage is {a_type(advantage)}; give the name of an estimator, such as {DEFAULT!r}, or one")
    estimator = advantage if isinstance(advantage, Advantage) else estimator_named(advantage)
    if options is not None and not isinstance(options, Mapping):
        raise DataError(f"advantage_options is {a_type(options)}; give a mapping, such as {{'eps': 1e-6}}")
    if not estimator.within_group and world_size() > 1:
        raise DataError(
            f"advantage={estimator.name!r} compares all sequences of a step, but rewards= is computed on each rank "
            "alone; compute the advantages of all ranks first and pass advantages="
        )
    numbers = [_numbers("rewards", fields, part).float() for fields, part in zip(batches, sequences, strict=True)]
    _check_finite(numbers)
    rewards = torch.cat(numbers)
    groups = torch.cat([_groups(fields, part, estimator) for fields, part in zip(batches, sequences, strict=True)])
    width = max(part.index.shape[1] for part in sequences)
    mask = torch.cat([part.by_sequence(part.is_scored, width, False) for part in sequences])
    logprobs = _logprobs(batches, sequences, width) if "logprobs" in estimator.needs else None
    terms = RewardTerms(rewards=rewards, group_ids=groups, mask=mask, logprobs=logprobs)
    computed = estimator.compute(terms, **(options or {}))
    if is_first and estimator.within_group:
        _warn_of_groups(batches, sequences, groups, is_zero=not computed.any(), name=estimator.name)
    parts = computed.split([part.number for part in sequences])
    return [part.spread(values) for part, values in zip(sequences, parts, strict=True)]


def _warn_of_groups(
    batches: Sequence[Mapping[str, Any]], sequences: Sequence[Sequences], groups: Tensor, *, is_zero: bool, name: str
) -> None:
    """Warn if no two of `groups` [S] are equal and all advantages are 0, or if a group follows different prompts."""
    if is_zero and len(groups.unique()) == len(groups):
        warn_once(
            f"every group has one completion, so all advantages of {name} are 0 and nothing is learnt; group_ids must "
            "be equal for the completions of one prompt"
        )
    of_batches = groups.split([part.number for part in sequences])
    for fields, part, of_batch in zip(batches, sequences, of_batches, strict=True):
        ids = fields.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids) == part.number == len(part.index):
            continue  # a packed row
        if _prompts_differ(ids, part.is_scored, of_batch):
            warn_once(
                "completions with equal group_ids follow different prompts, so rewards of different prompts are "
                "compared; where the completions of a prompt stand together, take "
                "torch.arange(num_prompts).repeat_interleave(group_size)"
            )


def _prompts_differ(ids: Tensor, is_scored: Tensor, groups: Tensor) -> bool:
    """Whether the last tokens before the completion differ within a group.

    Args:
        ids: [B, T] or [B, T + 1].
        is_scored: [B, T] bool, by the position that predicts the token.
        groups: [B] int64.
    """
    first = is_scored.long().argmax(-1)  # predicts the first token of the completion; 0: there may be no prompt
    compared = torch.arange(COMPARED, device=ids.device)
    columns = first.unsqueeze(-1) - compared
    tails = ids.gather(1, columns.clamp(min=0))
    _, group = groups.unique(return_inverse=True)
    rows = torch.arange(len(ids), device=ids.device)
    leader = rows.new_full((len(ids),), len(ids)).scatter_reduce(0, group, rows, "amin")[group]
    is_known = is_scored.any(-1) & (first > 0)
    is_there = (columns >= 0) & (columns[leader] >= 0) & (is_known & is_known[leader]).unsqueeze(-1)
    return bool(((tails != tails[leader]) & is_there).any())


def _check_finite(rewards: Sequence[Tensor]) -> None:
    """Raise `DataError` if a reward is NaN or infinite; `rewards` [number] of each batch."""
    for index, values in enumerate(rewards):
        wrong = (~values.isfinite()).nonzero().reshape(-1).tolist()
        if wrong:
            where = f"batches[{index}]: " if len(rewards) > 1 else ""
            raise DataError(
                f"{where}rewards[{wrong[0]}] is {float(values[wrong[0]])} ({len(wrong)} of {len(values)} rewards are "
                "NaN or infinite); give each row a number, or leave the row out"
            )


def _numbers(name: str, fields: Mapping[str, Any], part: Sequences) -> Tensor:
    """Return a field with one number for each sequence of a batch, [number]."""
    value = as_tensor(name, fields.get(name), part.index.device)
    shape = list(value.shape) if isinstance(value, Tensor) else a_type(value)
    if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == 1:
        value = value.squeeze(-1)
    if not isinstance(value, Tensor) or value.shape != (part.number,):
        raise DataError(f"{name} is {shape}; give one number for each of the {part.number} sequences, [{part.number}]")
    return value.to(part.index.device)


def _groups(fields: Mapping[str, Any], part: Sequences, estimator: Advantage) -> Tensor:
    if fields.get("group_ids") is None:
        if estimator.within_group:
            raise DataError(
                f"group_ids is missing beside rewards: advantage={estimator.name!r} compares the completions of one "
                f"prompt; give one integer for each of the {part.number} sequences, the same for those of one prompt"
            )
        return torch.arange(part.number, device=part.index.device)
    groups = _numbers("group_ids", fields, part)
    if groups.is_floating_point():
        raise DataError(f"group_ids is {groups.dtype}; give one integer for each of the {part.number} sequences")
    return groups.long()


def _logprobs(batches: Sequence[Mapping[str, Any]], sequences: Sequence[Sequences], width: int) -> Tensor | None:
    """Return the log-probabilities of the sampler [S, T] (or those before the step); None if a batch has neither."""
    rows = []
    for fields, part in zip(batches, sequences, strict=True):
        value = next(
            (fields[name] for name in ("rollout_logprobs", "old_logprobs") if fields.get(name) is not None), None
        )
        value = as_tensor("rollout_logprobs", value, part.index.device)
        if value is None or value.reshape(-1).shape != part.index.reshape(-1).shape:
            return None
        rows.append(part.by_sequence(value.reshape(part.index.shape).float(), width, 0.0))
    return torch.cat(rows)
