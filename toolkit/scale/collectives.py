"""What a collective costs: bytes that a rank sends, and messages that must wait for each other.

A *collective* is a call that all ranks of a group make together. Only its payload is visible from outside; what is
sent depends on the algorithm of the back-end. The formulas here assume the ring, which sends the fewest bytes, and for
the number of messages the better of ring and tree.

Legend: R ranks of the group, n bytes of the payload.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Collective:
    """Calls of one kind, and what each rank contributes to each of them."""

    what: str
    """Its purpose."""
    kind: Kind
    payload: int
    """n, bytes that one rank contributes to one call: the full tensor for all_reduce and reduce_scatter, its shard for
    all_gather."""
    ranks: int
    """R, the ranks of one call."""
    calls: int = 1
    """In one optimizer step."""

    @property
    def sent(self) -> float:
        """Bytes that each rank sends in all calls together, by the ring; an all-reduce is the two others in turn.

        Source: Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations".
        """
        share = {
            "all_reduce": 2 * (self.ranks - 1) / self.ranks,
            "reduce_scatter": (self.ranks - 1) / self.ranks,
            "all_gather": self.ranks - 1,
        }
        return self.calls * share[self.kind] * self.payload

    @property
    def messages(self) -> int:
        """Messages that wait for each other, in all calls together: ceil(log2 R) a call, twice that for an all-reduce.

        That is a tree (a butterfly for the gather), which back-ends choose for small payloads. A ring takes R - 1 or
        twice that, and is chosen where bytes outweigh messages.
        """
        hops = math.ceil(math.log2(self.ranks))
        return self.calls * (2 * hops if self.kind == "all_reduce" else hops)

    def seconds(self, *, bandwidth: float, latency: float = 10e-6) -> float:
        """Return the seconds of all calls: messages times latency, plus bytes over bandwidth; nothing overlaps.

        Args:
            bandwidth: bytes a second that a rank can send.
            latency: seconds of a message.
        """
        return self.messages * latency + self.sent / bandwidth


def total_sent(collectives: Iterable[Collective]) -> float:
    """Return the bytes that each rank sends in all of them."""
    return sum(collective.sent for collective in collectives)


def total_payload(collectives: Iterable[Collective]) -> int:
    """Return the bytes that each rank contributes to all calls of all of them: what a counter can see."""
    return sum(collective.calls * collective.payload for collective in collectives)


def total_calls(collectives: Iterable[Collective]) -> int:
    """Return the calls of all of them; a group of one rank makes none."""
    return sum(collective.calls for collective in collectives if collective.ranks > 1)
