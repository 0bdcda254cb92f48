"""How work is divided over processes, so a run is the same on any number of them.

Prompts are divided into consecutive shares: process after process, they are in the order of a single process.
Minibatches are cut from the rows of all processes at once; each process takes its rows of a minibatch, perhaps none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor


def share_of(number: int, rank: int, num_processes: int) -> slice:
    """Return the slice of `number` consecutive items that process `rank` takes; sizes differ by 1 at most."""
    return slice(rank * number // num_processes, (rank + 1) * number // num_processes)


@dataclass(frozen=True)
class Shares:
    """The processes that share the work, as one of them sees them."""

    rank: int
    """This process."""
    world: int
    """How many there are."""

    def of(self, number: int, rank: int | None = None) -> slice:
        """Return which of `number` consecutive items a process takes; None: this process."""
        return share_of(number, self.rank if rank is None else rank, self.world)

    def largest(self, number: int) -> int:
        """Return how many of `number` items the process with most of them takes."""
        return -(-number // self.world)


@dataclass(frozen=True)
class Minibatch:
    """The rows of one optimizer step."""

    local_rows: Tensor
    """[n] int64, indices into the rows of this process."""
    largest: int
    """Rows of the process that has most of them."""


def minibatches(rows_of: Sequence[int], rank: int, number: int, rng: Random, *, unit: int = 1) -> list[Minibatch]:
    """Cut the rows of all processes into minibatches at random, the same way on every process.

    Args:
        rows_of: for each process, how many rows it has.
        rank: this process.
        number: of minibatches; their sizes differ by `unit` at most.
        rng: equal on all processes.
        unit: rows that stay together, side by side on one process: the completions of a prompt.
    """
    total = sum(rows_of)
    ends = torch.tensor(rows_of).cumsum(0)
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    firsts = torch.randperm(total // unit, generator=generator).unsqueeze(-1) * unit
    batches = []
    for part in (firsts + torch.arange(unit)).tensor_split(number):
        rows = part.flatten()
        owner = torch.bucketize(rows, ends, right=True)
        sizes = torch.bincount(owner, minlength=len(rows_of))
        local_rows = rows[owner == rank] - (int(ends[rank]) - rows_of[rank])
        batches.append(Minibatch(local_rows, int(sizes.max())))
    return batches
