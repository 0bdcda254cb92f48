"""``python -m toolkit.scale.measure 2 4``: count what real processes communicate, and compare with the formulas.

Starts that many processes (gloo, on the CPU), runs small steps of every kind and prints a JSON object for each.

Legend: N scored tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from toolkit.distributed import counting_over, world_size
from toolkit.losses.grpo import GRPOLossConfig
from toolkit.losses.items import RLLossContextInputItem
from toolkit.scale.cases import all_cases
from toolkit.scale.collectives import total_calls, total_payload
from toolkit.scale.counters import AllocationCounter, CollectiveCounter
from toolkit.scale.head import head_memory
from toolkit.testing.processes import run_processes

HEAD = (8_000, 64, 256)
"""V, D and N of the heads whose memory is measured."""
HEAD_CHUNK = 64
MEMORY_TOLERANCE = 0.1
WARM_UP = 2
"""Steps that are not counted, because DDP arranges its buckets in the first ones."""


@dataclass(frozen=True)
class Counted:
    """One kind of step: the formulas, and the count on rank 0."""

    what: str
    ranks: int
    calls: int
    payload: int
    """Bytes that a rank contributes, by the formulas."""
    counted_calls: int
    counted_payload: int
    tolerance: float = 0.0
    """Relative amount by which the bytes may exceed the formula: 0 except for pickled tensors."""

    @property
    def agrees(self) -> bool:
        """Whether the calls are equal, and the bytes within the tolerance."""
        most = self.payload * (1 + self.tolerance)
        return self.calls == self.counted_calls and self.payload <= self.counted_payload <= most


@dataclass(frozen=True)
class Held:
    """The head's memory on rank 0, without weight and hidden states: planned, and measured."""

    what: str
    ranks: int
    shared_by: int
    """Ranks that share the vocabulary."""
    planned: int
    measured: int
    """Most bytes of tensors alive at once in forward and backward."""

    @property
    def agrees(self) -> bool:
        """Whether plan and measurement differ by no more than `MEMORY_TOLERANCE`."""
        return abs(self.planned / self.measured - 1) <= MEMORY_TOLERANCE


def measure(ranks: int) -> tuple[list[Counted], list[Held]]:
    """Start `ranks` processes, 2 or more, and return what rank 0 counted and held."""
    return run_processes(ranks, _measured)


def _measured() -> tuple[list[Counted], list[Held]]:
    return _count_all(world_size()), _hold_all(world_size())


def _count_all(ranks: int) -> list[Counted]:
    """Return every kind of step, counted on this rank."""
    mesh = init_device_mesh("cpu", (ranks,))
    counted = []
    torch.manual_seed(0)  # ranks that share a vocabulary have the same tokens
    for case in all_cases(ranks, mesh):
        for _ in range(WARM_UP):
            case.run()
        with CollectiveCounter() as seen:
            case.run()
        calls, payload = total_calls(case.formula), total_payload(case.formula)
        counted.append(Counted(case.what, ranks, calls, payload, seen.num_calls, seen.payload, case.tolerance))
    return counted


def _hold_all(ranks: int) -> list[Held]:
    """Return the memory of heads, on one rank and sharded over all."""
    mesh = init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "tp"))
    torch.manual_seed(0)
    size = f"head of {HEAD[0]:,} x {HEAD[1]:,}"
    planned = head_memory(*HEAD, is_eager=True).plan.peak_bytes
    measured = _measured_peak(torch.bfloat16, None, mode="eager")
    held = [Held(f"{size}, bfloat16, all logits at once", ranks, 1, planned, measured)]
    for dtype in (torch.bfloat16, torch.float64):  # fp32 uses another product on a CPU, with an extra buffer
        for shared_by in (1, ranks):
            plan = head_memory(*HEAD, vocab_parallel=shared_by, dtype=dtype, chunk_size=HEAD_CHUNK).plan
            measured = _measured_peak(dtype, mesh if shared_by > 1 else None, mode="chunk")
            name = f"{size}, {str(dtype).removeprefix('torch.')}"
            held.append(Held(name, ranks, shared_by, plan.peak_bytes, measured))
    return held


def _measured_peak(dtype: torch.dtype, mesh: DeviceMesh | None, *, mode: Literal["eager", "chunk"]) -> int:
    vocabulary, width, tokens = HEAD
    hidden = torch.randn(1, tokens, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
    weight = weight if mesh is None else distribute_tensor(weight, mesh["tp"], [Shard(0)])
    weight.requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens))
    item = RLLossContextInputItem(shifted_labels=labels, advantages=torch.ones(1, tokens))
    cfg = GRPOLossConfig(mode=mode, chunk_size=HEAD_CHUNK)
    with contextlib.nullcontext() if mesh is None else counting_over(mesh["dp"].get_group()):
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        context = cfg.loss_ctx_cls(cfg, kwargs)
        for _ in range(WARM_UP):
            with AllocationCounter(hidden, weight) as seen:
                loss, _ = context.forward(hidden, weight)
                torch.autograd.grad(loss, [hidden, weight])
    return seen.peak


def main() -> None:
    """Run the command line: numbers of processes."""
    if not sys.argv[1:] or not all(word.isdigit() and int(word) > 1 for word in sys.argv[1:]):
        raise SystemExit("usage: python -m toolkit.scale.measure N ..., each N a number of processes, 2 or more")
    for ranks in map(int, sys.argv[1:]):
        counted, held = measure(ranks)
        rows: list[Counted | Held] = [*counted, *held]
        for row in rows:
            print(json.dumps({**asdict(row), "agrees": row.agrees}))


if __name__ == "__main__":
    main()
