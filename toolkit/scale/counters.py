"""Counters below every interface of PyTorch: the collectives that a call makes, and the memory that it needs."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_TENSORS_SECOND = (
    "allgather_",
    "_allgather_base_",
    "allgather_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_",
    "_reduce_scatter_base_",
    "reduce_scatter_tensor_coalesced_",
    "scatter_",
    "alltoall_base_",
)
"""Operators whose second argument has the tensors of this rank; for all others it is the first."""
_NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd")


class CollectiveCounter(TorchDispatchMode):
    """Count every collective, whoever makes it: `torch.distributed`, DDP, FSDP2 or DTensor, also in backward.

    Example:
        >>> with CollectiveCounter() as seen:
        ...     loss.backward()
        >>> seen.num_calls, seen.payload
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        """Collectives that were made."""
        self.payload = 0
        """Bytes that this rank contributed to all of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd"):
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Sequence[Any]) -> None:
        if name not in _NO_TRAFFIC:
            leaves = tree_leaves(args[1 if name in _TENSORS_SECOND else 0])
            self.num_calls += 1
            self.payload += sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor))


class AllocationCounter(TorchDispatchMode):
    """Track storages from allocation to release: the memory that a call needs, whatever the allocator does.

    Args:
        known: tensors that exist already and do not count.

    Example:
        >>> with AllocationCounter(hidden, weight) as seen:
        ...     loss.backward()
        >>> seen.peak
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self._known = {_local(tensor).untyped_storage()._cdata for tensor in known}
        self.live = 0
        """Bytes alive now."""
        self.peak = 0
        """Most bytes alive at once."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(_local(leaf).untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _local(tensor: Any) -> Tensor:
    """Return this rank's part of a sharded tensor (DTensor), any other tensor as it is."""
    return tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
