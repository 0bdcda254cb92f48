"""Rows of text with the per-token fields of a loss; made from rollouts or from labelled answers.

Legend: R rows, T tokens of a row; per-token fields have T - 1 positions; position t is about token t + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from toolkit.functional.rewards import RewardTerms
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.losses.items import CELossContextInputItem, LossContextInputItem, RLLossContextInputItem
from toolkit.rollout.sampler import Completions
from toolkit.tasks.base import Example
from toolkit.tasks.episodes import Episode

IGNORED = -100
NO_GROUP = -1
"""Group of a row without a prompt."""
PADDING = {"shifted_labels": IGNORED, "rollout_logprobs": float("nan"), "group_ids": NO_GROUP}
"""Values of positions behind a row, where they are not 0."""


@dataclass(frozen=True)
class Rows:
    """Text rows and their per-token fields; [R, T] and [R, T - 1]."""

    input_ids: Tensor
    attention_mask: Tensor
    shifted_labels: Tensor
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    current_logprobs: Tensor | None = None
    """Of the policy that the next optimizer step updates."""
    ref_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None
    group_ids: Tensor | None = None
    temperature: float = 1.0
    """At which the rows were sampled."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def select(self, index: Tensor | slice) -> Rows:
        """Return some of the rows; `index` is a slice, or int64 [n] for n of them."""
        parts: dict[str, Any] = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **parts)

    def split(self, size: int, number: int | None = None) -> list[Rows]:
        """Cut into consecutive pieces of at most `size` rows, padded with pieces that score nothing up to `number`.

        Every forward is a collective under DDP, so all processes need the same number.
        """
        pieces = [self.select(slice(start, start + size)) for start in range(0, len(self), size)]
        return pieces + [self.unscored_row()] * ((number or 0) - len(pieces))

    def unscored_row(self) -> Rows:
        """Return one row with the same fields and nothing to score, even if there are no rows."""
        parts = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        # Attention over no tokens would be NaN, which reaches the weights even with a gradient of 0.
        fill = {"attention_mask": 1, "shifted_labels": IGNORED, "group_ids": NO_GROUP}
        unscored: dict[str, Any] = {
            name: value.new_full((1, *value.shape[1:]), fill.get(name, 0)) for name, value in parts.items()
        }
        return replace(self, **unscored)

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Concatenate rows with the same fields; shorter ones are padded on the right with positions not scored."""
        widths = [part.input_ids.shape[1] for part in parts]
        tensors: dict[str, Any] = {}
        for name, value in vars(parts[0]).items():
            if isinstance(value, Tensor):
                columns = [
                    pad(getattr(part, name), (0, max(widths) - width), value=PADDING.get(name, 0))
                    for part, width in zip(parts, widths, strict=True)
                ]
                tensors[name] = torch.cat(columns)
        return replace(parts[0], **tensors)

    def item(self, ignore_idx: int) -> LossContextInputItem:
        """Return the input item of a loss: a policy loss's when there are advantages, else cross-entropy's."""
        labels = self.shifted_labels.masked_fill(self.shifted_labels == IGNORED, ignore_idx)
        if self.advantages is None:
            return CELossContextInputItem(shifted_labels=labels)
        return RLLossContextInputItem(
            shifted_labels=labels,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            current_logprobs=self.current_logprobs,
            ref_logprobs=self.ref_logprobs,
            rollout_logprobs=self.rollout_logprobs,
            group_ids=self.group_ids,
            rollout_spec=LogprobSpec(temperature=self.temperature),
        )


def rows_from_completions(completions: Completions, group_ids: Tensor, *, temperature: float = 1.0) -> Rows:
    """Turn completions into rows that score the new tokens, without advantages yet.

    Args:
        completions: R rows of T tokens.
        group_ids: [R] the prompt that each completion answers, unique over all processes.
        temperature: at which they were sampled.
    """
    labels = completions.input_ids.masked_fill(~completions.is_new, IGNORED)[:, 1:]
    return Rows(
        input_ids=completions.input_ids,
        attention_mask=completions.attention_mask,
        shifted_labels=labels,
        rollout_logprobs=completions.logprobs[:, 1:],
        group_ids=group_ids.to(labels.device).unsqueeze(-1).expand(labels.shape),
        temperature=temperature,
    )


def reward_terms(
    rewards: Tensor, completions: Completions, parts: Tensor | None = None, weights: Tensor | None = None
) -> RewardTerms:
    """Return what an advantage estimator sees of completions, on the CPU.

    With an environment, a turn's reward is at its last token, and the rest of the reward at that of the row.

    Args:
        rewards: [P, G] of G completions of each of P prompts.
        completions: P x G rows of T tokens.
        parts: [P x G, K] several rewards of each completion; None: there is one.
        weights: [K] of each in their sum.
    """
    groups = torch.arange(len(rewards)).repeat_interleave(rewards.shape[1])
    mask = completions.is_new[:, 1:].cpu()
    of_turns: dict[str, Tensor] = {}
    if completions.episodes is not None:
        ends = mask & ~pad(mask[:, 1:], (0, 1))
        of_turns = {
            "token_rewards": _turn_rewards(rewards.flatten(), ends, completions.episodes),
            "input_lengths": completions.attention_mask.sum(-1).cpu() - mask.sum(-1),
            "num_turns": ends.sum(-1),
        }
    return RewardTerms(
        rewards=rewards.flatten(),
        group_ids=groups,
        lengths=mask.sum(-1),
        mask=mask,
        rewards_multi=parts,
        reward_weights=None if parts is None else weights,
        **of_turns,
    )


def _turn_rewards(rewards: Tensor, ends: Tensor, episodes: Sequence[Episode]) -> Tensor:
    """Return the reward of each token, [R, T - 1]: they add up to `rewards` [R].

    Args:
        rewards: [R] of each episode, NaN where unknown.
        ends: [R, T - 1] bool, True at the last token of each turn; an observation is between two turns.
        episodes: R of them.
    """
    token_rewards = torch.zeros(ends.shape, dtype=rewards.dtype)
    for row, (is_end, episode) in enumerate(zip(ends, episodes, strict=True)):
        values = torch.tensor(episode.turn_rewards, dtype=rewards.dtype)
        values[-1] += rewards[row] - values.sum()
        token_rewards[row, is_end] = values
    return token_rewards


def joined_terms(parts: Sequence[RewardTerms]) -> RewardTerms:
    """Concatenate the terms of several processes in order; their groups stay separate, short rows are padded."""
    width = max(part.require("mask").shape[1] for part in parts)

    def joined(name: str) -> Tensor | None:
        values: list[Tensor | None] = [getattr(part, name) for part in parts]
        known = [value for value in values if value is not None]
        return torch.cat([pad(v, (0, width - v.shape[1])) if v.dim() == 2 else v for v in known]) if known else None

    has_several = parts[0].rewards_multi is not None
    first_group, groups = 0, []
    for part in parts:
        groups.append(part.group_ids + first_group)
        first_group += int(part.group_ids.max()) + 1 if len(part.group_ids) else 0
    return RewardTerms(
        rewards=torch.cat([part.rewards for part in parts]),
        group_ids=torch.cat(groups),
        lengths=torch.cat([part.require("lengths") for part in parts]),
        mask=joined("mask"),
        token_rewards=joined("token_rewards"),
        input_lengths=joined("input_lengths"),
        num_turns=joined("num_turns"),
        rewards_multi=torch.cat([part.require("rewards_multi") for part in parts]) if has_several else None,
        reward_weights=parts[0].reward_weights,
    )


def selected_terms(terms: RewardTerms, index: Tensor) -> RewardTerms:
    """Return the terms of some completions: `index` [S] bool."""
    values = {field.name: getattr(terms, field.name) for field in fields(terms) if field.name != "reward_weights"}
    return replace(terms, **{name: value[index] for name, value in values.items() if value is not None})


def rows_from_answers(examples: Sequence[Example], tokenizer: Any, device: torch.device) -> Rows:
    """Turn demonstrations (or none) into rows that score what is to be imitated, the end of the text included."""
    tokens, is_scored = [], []
    for example in examples:
        pieces = example.segments or ((example.prompt, False), (example.answer, True))
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text, _ in pieces]
        marks = [[scored] * len(piece) for piece, (_, scored) in zip(ids, pieces, strict=True)]
        tokens.append([token for piece in ids for token in piece])
        is_scored.append([mark for piece in marks for mark in piece])
        if not tokens[-1] or tokens[-1][-1] != tokenizer.eos_token_id:  # a chat template may have written it
            tokens[-1].append(tokenizer.eos_token_id)
            is_scored[-1].append(True)
    width = max([2, *map(len, tokens)])
    input_ids = torch.full((len(examples), width), tokenizer.pad_token_id)
    labels = torch.full((len(examples), width), IGNORED)
    mask = torch.zeros((len(examples), width), dtype=torch.int64)
    for row, (text, scored) in enumerate(zip(map(torch.tensor, tokens), map(torch.tensor, is_scored), strict=True)):
        first = width - len(text)
        input_ids[row, first:] = text
        labels[row, first + 1 :] = text.where(scored, IGNORED)[1:]  # nothing precedes the first token
        mask[row, first:] = 1
    return Rows(input_ids.to(device), mask.to(device), labels[:, 1:].to(device))
