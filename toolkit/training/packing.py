"""Micro-batches of an optimizer step: padded rows, or sequences packed end to end under a budget of tokens.

A padded row computes its padding, too; a packed one computes tokens only. Position ids start again at 0 in each
sequence of a packed row, attention stays within a sequence, and the loss gets the boundaries, so loss and gradient are
those of padded rows to rounding.

Legend: R rows of T tokens, padded; N tokens of a packed row, S sequences in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toolkit.distributed import all_gather_ragged
from toolkit.errors import warn_once
from toolkit.losses.packing import plan_rows
from toolkit.training.experience import IGNORED, Rows


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees."""

    rows: Rows
    """Padded rows [B, T], or one packed row [1, N]."""
    position_ids: Tensor | None = None
    """[1, N] of a packed row: the position of each token in its sequence."""
    cu_seq_lens: Tensor | None = None
    """[S + 1] boundaries of a packed row among its N - 1 positions."""

    def forward(self, policy: Any, loss_ctx: Any = None, **options: Any) -> Any:
        """Return ``policy(...)`` of these tokens; `options` are those of `Policy.forward`."""
        if self.position_ids is not None:
            options["position_ids"] = self.position_ids
        return policy(self.rows.input_ids, self.rows.attention_mask, loss_ctx, **options)


@dataclass(frozen=True)
class PaddedPlan:
    """Rows as they are, a fixed number in each micro-batch."""

    size: int
    """Most rows of a micro-batch."""
    number: int
    """Micro-batches, the same on all processes."""

    def cut(self, rows: Rows) -> list[MicroBatch]:
        """Return the micro-batches of these rows; without rows they score nothing."""
        return [MicroBatch(piece) for piece in rows.split(self.size, self.number)]

    def put_back(self, values: Sequence[Tensor], rows: Rows) -> Tensor:
        """Return the values of all rows, [R, T - 1], from `values` [B, T - 1] of each micro-batch."""
        return torch.cat(list(values))[: len(rows)]


@dataclass(frozen=True)
class PackedPlan:
    """Which sequences share a packed row."""

    packs: list[list[int]]
    """For each packed row the numbers of its sequences."""
    number: int
    """Packed rows, the same on all processes."""
    most_together: int
    """Sequences of the packed row, on any process, that has most of them."""

    @classmethod
    def agreed(cls, rows: Rows, budget: int) -> PackedPlan:
        """Plan the rows of this process under a budget of tokens; all processes call it together.

        A sequence longer than the budget gets a packed row for itself.
        """
        lengths = rows.attention_mask.sum(-1).tolist()
        longest = max(lengths, default=0)
        if longest > budget:
            warn_once(
                f"a sequence of {longest} tokens is longer than training.micro_batch_tokens={budget}; it is computed "
                "alone, in more memory than planned"
            )
        packs = plan_rows(lengths, budget)
        here = torch.tensor([len(packs), max(map(len, packs), default=0)])
        number, most_together = torch.stack(all_gather_ragged(here, room=2)).amax(0).tolist()
        return cls(packs, max(1, number), most_together)

    def cut(self, rows: Rows) -> list[MicroBatch]:
        """Return the packed rows; those that other processes have more score nothing."""
        packed = [pack(rows, numbers) for numbers in self.packs]
        return packed + [unscored(rows)] * (self.number - len(packed))

    def put_back(self, values: Sequence[Tensor], rows: Rows) -> Tensor:
        """Return the values of all rows, [R, T - 1], 0 at padding, from `values` [1, N - 1] of each packed row."""
        placed = values[0].new_zeros(rows.shifted_labels.shape)
        for numbers, packed in zip(self.packs, values, strict=False):  # unscored rows belong to nobody
            tokens = tokens_of(rows, numbers)
            if len(tokens.row) > 1:
                at = tokens.row[1:][tokens.follows], tokens.column[1:][tokens.follows] - 1
                placed[at] = packed[0][tokens.follows]
        return placed


Plan = PaddedPlan | PackedPlan


class Tokens(NamedTuple):
    """The tokens of a packed row, and where they are among the padded rows."""

    row: Tensor
    """[N] int64."""
    column: Tensor
    """[N] int64."""
    position: Tensor
    """[N] int64, in its sequence, from 0."""
    follows: Tensor
    """[N - 1] bool: whether token n + 1 belongs to the sequence of token n, so there is something to score."""


def tokens_of(rows: Rows, numbers: Sequence[int]) -> Tokens:
    """Return the tokens of the rows with these numbers, one sequence after the other, without padding."""
    chosen = torch.tensor(list(numbers), device=rows.attention_mask.device, dtype=torch.int64)
    is_token = rows.attention_mask[chosen].bool()
    row, column = is_token.nonzero(as_tuple=True)
    position = (is_token.long().cumsum(-1) - 1)[row, column]
    return Tokens(chosen[row], column, position, position[1:] != 0)


def pack(rows: Rows, numbers: Sequence[int]) -> MicroBatch:
    """Put the rows with these numbers end to end, without their padding.

    Position n of a per-token field is about token n + 1, as in padded rows; where that begins the next sequence it has
    no label.
    """
    tokens = tokens_of(rows, numbers)
    if len(tokens.row) < 2:  # nothing to score, and the trunk needs a token that predicts one
        return unscored(rows)
    last = rows.shifted_labels.shape[-1] - 1
    # Per-token fields of the last position of a sequence are read by nobody; they stay those of its row.
    about = tokens.column[1:].sub(1).where(tokens.follows, tokens.column[:-1].clamp(max=last))
    packed: dict[str, Any] = {
        name: value[tokens.row[:-1], about].unsqueeze(0)
        for name, value in vars(rows).items()
        if isinstance(value, Tensor)
    }
    packed["shifted_labels"] = packed["shifted_labels"].masked_fill(~tokens.follows, IGNORED)
    packed["input_ids"] = rows.input_ids[tokens.row, tokens.column].unsqueeze(0)
    # A router loss counts the same tokens as in padded rows, where the trunk does not see the last column.
    packed["attention_mask"] = (tokens.column <= last).to(rows.attention_mask).unsqueeze(0)
    starts = (tokens.position == 0).nonzero().squeeze(-1)
    end = starts.new_tensor([len(tokens.follows)])
    return MicroBatch(
        rows=replace(rows, **packed),
        position_ids=tokens.position.unsqueeze(0),
        cu_seq_lens=torch.cat([starts, end]),
    )


def unscored(rows: Rows) -> MicroBatch:
    """Return a packed row of two tokens with the same fields and nothing to score."""
    padded = rows.unscored_row()
    short: dict[str, Any] = {
        name: value[:, : 2 if name in ("input_ids", "attention_mask") else 1]
        for name, value in vars(padded).items()
        if isinstance(value, Tensor)
    }
    positions = torch.arange(2, device=rows.input_ids.device)
    return MicroBatch(rows=replace(rows, **short), position_ids=positions.unsqueeze(0), cu_seq_lens=positions)
