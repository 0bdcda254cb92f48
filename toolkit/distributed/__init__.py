"""Sums over ranks, sequence-parallel split and gather, which ranks share what, a check of the number of processes.

Everything here also works in one process without a process group.
"""

from toolkit.distributed.counting import (
    counted_group,
    counted_over,
    counted_with,
    counting_as_before,
    counting_over,
    gradient_divisor,
    rank,
    rank_of,
    world_size,
)
from toolkit.distributed.exchange import (
    all_gather_objects,
    all_gather_ragged,
    all_reduce_sum,
    collective_device,
    reduce_metrics,
)
from toolkit.distributed.launch_check import check_world_size
from toolkit.distributed.parallelism import Parallelism, from_accelerate
from toolkit.distributed.sequence import SequenceMesh, sp_gather, sp_split

__all__ = [
    "Parallelism",
    "SequenceMesh",
    "all_gather_objects",
    "all_gather_ragged",
    "all_reduce_sum",
    "check_world_size",
    "collective_device",
    "counted_group",
    "counted_over",
    "counted_with",
    "counting_as_before",
    "counting_over",
    "from_accelerate",
    "gradient_divisor",
    "rank",
    "rank_of",
    "reduce_metrics",
    "sp_gather",
    "sp_split",
    "world_size",
]
