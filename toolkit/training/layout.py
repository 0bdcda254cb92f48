"""How work is divided over processes, so a run is the same on any number of them.

Prompts are divided into consecutive shares: process after process, they are in the order of a single process.
Minibatches are cut from the rows of all processes at once; each process takes its rows of a minibatch, perhaps none.
"""

from __future__ import annotations

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

    def owners(self, number: int) -> Tensor:
        """Return the process that takes each of `number` consecutive items, [number] int64."""
        sizes = [len(range(number)[self.of(number, rank)]) for rank in range(self.world)]
        return torch.arange(self.world).repeat_interleave(torch.tensor(sizes))

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


def minibatches(owners: Tensor, rank: int, number: int, rng: Random, *, unit: int = 1) -> list[Minibatch]:
    """Cut the rows of all processes into minibatches at random, the same way on every process.

    Args:
        owners: [N] int64, the process that has each of the N rows of all; a process has its rows in this order.
        rank: this process.
        number: of minibatches; their sizes differ by `unit` at most.
        rng: equal on all processes.
        unit: rows that stay together, side by side on one process: the completions of a prompt.
    """
    is_local = owners == rank
    local_index = is_local.cumsum(0) - 1
    generator = torch.Generator().manual_seed(rng.getrandbits(63))
    firsts = torch.randperm(len(owners) // unit, generator=generator).unsqueeze(-1) * unit
    batches = []
    for part in (firsts + torch.arange(unit)).tensor_split(number):
        rows = part.flatten()
        batches.append(Minibatch(local_index[rows[is_local[rows]]], most_of_one(owners[rows])))
    return batches


def most_of_one(owners: Tensor) -> int:
    """Return how many rows the process has that has most of them: `owners` [N] int64 is the process of each row."""
    return int(torch.bincount(owners, minlength=1).max())
