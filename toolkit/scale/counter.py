"""Count every collective that PyTorch makes: calls, bytes, ranks.

The counter works below every interface (`torch.distributed`, DDP, FSDP2, DTensor): it sees the operators that they all
call, including those of backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operator: (kind, index of the argument with the tensors of this rank)
_OPERATORS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_": ("all_gather", 1),
    "_allgather_base_": ("all_gather", 1),
    "allgather_coalesced_": ("all_gather", 1),
    "allgather_into_tensor_coalesced_": ("all_gather", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", 0),
    "all_gather_into_tensor_coalesced": ("all_gather", 0),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "broadcast_": ("broadcast", 0),
    "broadcast": ("broadcast", 0),
    "scatter_": ("scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "all_to_all_single": ("all_to_all", 0),
    "barrier": ("barrier", 0),
}
_NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")


@dataclass(frozen=True)
class Call:
    """One collective that was made."""

    kind: str
    payload: int
    """Bytes that this rank contributed."""
    ranks: int
    """Of its group."""


class CollectiveCounter(TorchDispatchMode):
    """Record every collective that is made inside ``with CollectiveCounter() as seen:``.

    Example:
        >>> with CollectiveCounter() as seen:
        ...     loss.backward()
        >>> seen.num_calls, seen.payload
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    @property
    def num_calls(self) -> int:
        """Collectives that were made."""
        return len(self.calls)

    @property
    def payload(self) -> int:
        """Bytes that this rank contributed to all of them."""
        return sum(call.payload for call in self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._record(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _record(self, name: str, args: Sequence[Any]) -> None:
        if name in _NO_TRAFFIC:
            return
        kind, index = _OPERATORS.get(name, (name, 0))
        size = sum(leaf.nbytes for leaf in tree_leaves(args[index]) if isinstance(leaf, Tensor))
        self.calls.append(Call(kind, size, _ranks_of(args)))


def _ranks_of(args: Sequence[Any]) -> int:
    for argument in args:
        if isinstance(argument, torch.ScriptObject):
            try:
                return dist.ProcessGroup.unbox(argument).size()
            except RuntimeError:  # an option such as ReduceOp, not the group
                continue
    name: Any = next((argument for argument in reversed(args) if isinstance(argument, str)), None)
    return _resolve_process_group(name).size() if name is not None else dist.get_world_size()
