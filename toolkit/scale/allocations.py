"""Count the bytes of every tensor that an operator allocates, and the most that are alive at once."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


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
