"""What is counted over all ranks before the first forward of an optimizer step, in one exchange.

Plain numbers (tokens, sequences, sums of weights ...) take one all-reduce of K float64 numbers, whatever the number of
tokens, micro-batches or ranks. Only a loss that compares prompts needs more: each rank's small table of its prompts is
gathered in their place, and the numbers ride along. A rank whose items were refused takes part, too, so that the others
hear of it instead of waiting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.distributed import all_gather_ragged, all_reduce_sum, rank, world_size
from toolkit.errors import DataError

ROOM = 256
"""Numbers of a rank that one exchange carries where there are tables; more prompts than some 120 take a second one."""

Table = dict[int, float]
"""A number for each key: the tokens of each prompt, say."""


@dataclass(frozen=True)
class Counts:
    """What one rank counted, or all ranks together."""

    numbers: Tensor
    """[K] float64."""
    tables: dict[str, Table] = field(default_factory=dict)

    def uncounted(self) -> Counts:
        """Return nothing in the same shape: another rank of a sequence-parallel mesh counts the same sequences."""
        return Counts(torch.zeros_like(self.numbers), {name: {} for name in self.tables})


def census(count: Callable[[], Counts], *, num_numbers: int, has_tables: bool, device: torch.device) -> Counts:
    """Return what all ranks counted together; every rank must call it, once for each optimizer step.

    Args:
        count: counts on this rank.
        num_numbers: K, the same on every rank.
        has_tables: whether there are tables, the same on every rank.
        device: of the numbers.

    Raises:
        DataError, ConfigError: `count` raised it on this rank; DataError: it did on another one.
    """
    try:
        own, error = count(), None
    except Exception as caught:  # whatever it is, the others must hear of it before it travels on
        own, error = Counts(torch.zeros(num_numbers, dtype=torch.float64, device=device)), caught
    if world_size() == 1:
        if error is not None:
            raise error
        return own
    flags = own.numbers.new_tensor([1.0, float(rank())] if error is not None else [0.0, 0.0])
    packed = torch.cat([flags, own.numbers])
    everyone: list[Tensor] = []
    if has_tables:
        everyone = all_gather_ragged(torch.cat([_bits(packed), _as_vector(own.tables)]), room=ROOM)
        packed = torch.stack([_from_bits(vector[: len(packed)]) for vector in everyone]).sum(0).to(packed.device)
    else:
        packed = all_reduce_sum(packed)
    failed, failed_rank = packed[:2].tolist()
    if error is not None:
        raise error
    if failed:
        who = f"rank {int(failed_rank)}" if failed == 1 else f"{int(failed)} other ranks"
        raise refused_elsewhere(who)
    return Counts(packed[2:], _added(_as_tables(vector[len(packed) :], own.tables) for vector in everyone))


def refused_elsewhere(who: str) -> DataError:
    """Return the error of a rank whose own items are right."""
    told = DataError(f"{who} refused the items of this step, so that no rank can go on; see the message there")
    told.is_from_elsewhere = True
    return told


def _as_vector(tables: dict[str, Table]) -> Tensor:
    """Return tables as int64, in the order of their names: length, keys and the bits of the numbers of each."""
    parts = [torch.zeros(0, dtype=torch.int64)]
    for name in sorted(tables):
        numbers = torch.tensor([*tables[name].values()], dtype=torch.float64)
        parts += [torch.tensor([len(numbers), *tables[name]]), _bits(numbers)]
    return torch.cat(parts)


def _as_tables(vector: Tensor, names: Iterable[str]) -> dict[str, Table]:
    """Return the tables of another rank, which has the same names."""
    found: dict[str, Table] = {}
    for name in sorted(names):
        size = int(vector[0])
        keys, numbers, vector = vector[1:].split([size, size, len(vector) - 1 - 2 * size])
        found[name] = dict(zip(keys.tolist(), _from_bits(numbers).tolist(), strict=True))
    return found


def _bits(numbers: Tensor) -> Tensor:
    return numbers.cpu().contiguous().view(torch.int64)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.float64)


def _added(parts: Iterable[dict[str, Table]]) -> dict[str, Table]:
    total: dict[str, Table] = {}
    for part in parts:
        for name, table in part.items():
            own = total.setdefault(name, {})
            for key, number in table.items():
                own[key] = own.get(key, 0.0) + number
    return total
