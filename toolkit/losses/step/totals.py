"""What is counted over all ranks before the first forward of an optimizer step, in one exchange.

Plain numbers (tokens, sequences, sums of weights ...) take one all-reduce of K float64 numbers, whatever the number of
tokens, micro-batches or ranks. Only a loss that compares prompts needs more: instead one all-gather carries each rank's
small table of its prompts along with the numbers. A rank with invalid items takes part, too, so the others raise
instead of hanging.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from toolkit.distributed import all_gather_objects, all_gather_ragged, all_reduce_sum, rank, world_size
from toolkit.errors import ConfigError, DataError

FLAGS = ("failed", "failed_rank", "digest", "digest_squared")
"""Numbers before those that are counted."""
NUMBERS = 16
"""Flags and counts are filled up to a multiple of it."""
ROOM = 256
"""Numbers of a rank in one exchange of tables; more than about 120 prompts take a second one."""

Table = dict[int, float]
"""A number for each key, e.g. the tokens of each prompt."""


@dataclass(frozen=True)
class Counts:
    """What one rank counted, or the sum over all ranks."""

    numbers: Tensor
    """[K] float64."""
    tables: dict[str, Table] = field(default_factory=dict)

    def uncounted(self) -> Counts:
        """Return zeros in the same shape: another rank of a sequence-parallel mesh counts the same sequences."""
        return Counts(torch.zeros_like(self.numbers), {name: {} for name in self.tables})


def exchange_counts(
    count: Callable[[], Counts],
    *,
    num_numbers: int,
    has_tables: bool,
    device: torch.device,
    settings: Callable[[], Mapping[str, str]] = dict,
) -> Counts:
    """Return the counts of all ranks added up; every rank must call it, once for each optimizer step.

    `count` returns those of this rank; K and whether there are tables must be equal on every rank, and so must
    `settings()`, which are compared in the same exchange.

    Raises:
        DataError, ConfigError: `count` raised it on this rank. DataError: `count` raised on another rank.
        ConfigError: the settings of the ranks differ; names them.
    """
    try:
        local_counts, error = count(), None
    except Exception as caught:  # of any type: the other ranks must know of it before it is raised
        local_counts, error = Counts(torch.zeros(num_numbers, dtype=torch.float64, device=device)), caught
    if world_size() == 1:
        if error is not None:
            raise error
        return local_counts
    failed_here = [1.0, float(rank())] if error is not None else [0.0, 0.0]
    digest = _digest(settings())
    # Filled up: ranks whose losses differ in their terms then exchange as many numbers, and see the difference.
    spare = [0.0] * (numbers_exchanged(num_numbers) - len(FLAGS) - num_numbers)
    flags, rest = (local_counts.numbers.new_tensor(each) for each in ([*failed_here, digest, digest**2], spare))
    packed = torch.cat([flags, local_counts.numbers, rest])
    everyone: list[Tensor] = []
    if has_tables:
        everyone = all_gather_ragged(torch.cat([_bits(packed), _as_vector(local_counts.tables)]), room=ROOM)
        packed = torch.stack([_from_bits(vector[: len(packed)]) for vector in everyone]).sum(0).to(packed.device)
    else:
        packed = all_reduce_sum(packed)
    failed, failed_rank, *digests = packed[: len(FLAGS)].tolist()
    if error is not None:
        raise error
    if failed:
        who = f"rank {int(failed_rank)}" if failed == 1 else f"{int(failed)} other ranks"
        raise rejected_elsewhere(who)
    if not _are_equal(*digests):
        raise _differing(all_gather_objects(dict(settings())))
    tables = _added(_as_tables(vector[len(packed) :], local_counts.tables) for vector in everyone)
    return Counts(packed[len(FLAGS) :][:num_numbers], tables)


def numbers_exchanged(num_numbers: int) -> int:
    """Return how many numbers each rank sends if it counts `num_numbers`."""
    return -(-(len(FLAGS) + num_numbers) // NUMBERS) * NUMBERS


def _digest(settings: Mapping[str, str]) -> float:
    """Return 16 bits of the settings: the sum of the squares over 10,000 ranks is then exact in float64."""
    return float(zlib.crc32(repr(sorted(settings.items())).encode()) & 0xFFFF)


def _are_equal(total: float, squares: float) -> bool:
    """Whether numbers whose sum and sum of squares over all ranks these are can only be one number."""
    return int(total) ** 2 == int(squares) * world_size()


def _differing(by_rank: Sequence[Mapping[str, str]]) -> ConfigError:
    differences = []
    for name in sorted({name for settings in by_rank for name in settings}):
        ranks_of: dict[str, list[int]] = {}
        for number, settings in enumerate(by_rank):
            ranks_of.setdefault(settings.get(name, "absent"), []).append(number)
        if len(ranks_of) > 1:
            values = (f"{value} on rank {', '.join(map(str, ranks))}" for value, ranks in ranks_of.items())
            differences.append(f"{name} is {'; '.join(values)}")
    return ConfigError(f"the losses of this step's ranks differ: {'. '.join(differences)}. Give all ranks one config")


def rejected_elsewhere(who: str) -> DataError:
    """Return the error of a rank that stops because of another rank's items."""
    error = DataError(f"{who} rejected the items of this step, so all ranks stop; see the error there")
    error.is_from_elsewhere = True
    return error


def _as_vector(tables: dict[str, Table]) -> Tensor:
    """Return tables as int64, ordered by name: for each its length, its keys and the bits of its numbers."""
    parts = [torch.zeros(0, dtype=torch.int64)]
    for name in sorted(tables):
        numbers = torch.tensor([*tables[name].values()], dtype=torch.float64)
        parts += [torch.tensor([len(numbers), *tables[name]]), _bits(numbers)]
    return torch.cat(parts)


def _as_tables(vector: Tensor, names: Iterable[str]) -> dict[str, Table]:
    """Return the tables of another rank, which has the same names."""
    tables: dict[str, Table] = {}
    for name in sorted(names):
        size = int(vector[0])
        keys, numbers, vector = vector[1:].split([size, size, len(vector) - 1 - 2 * size])
        tables[name] = dict(zip(keys.tolist(), _from_bits(numbers).tolist(), strict=True))
    return tables


def _bits(numbers: Tensor) -> Tensor:
    return numbers.cpu().contiguous().view(torch.int64)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.contiguous().view(torch.float64)


def _added(parts: Iterable[dict[str, Table]]) -> dict[str, Table]:
    total: dict[str, Table] = {}
    for name, table in (named for part in parts for named in part.items()):
        total_table = total.setdefault(name, {})
        for key, number in table.items():
            total_table[key] = total_table.get(key, 0.0) + number
    return total
