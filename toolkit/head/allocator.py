"""Let a process on a CPU keep the memory that it frees, as an allocator on a GPU does.

A gradient of V x D and a chunk's logits are new memory in every step, and the kernel hands new memory out in pages of
4 KB, and each costs a page fault. Measured, the head in bf16 (N 512, D 896, V 151936): 1.04 times the bare products
with memory that is kept, 1.15 without. jemalloc and tcmalloc keep it by themselves. Huge pages do not help: where
memory is fragmented, the kernel's search for them took more time than the faults.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from <malloc.h>."""


def keep_freed_memory() -> bool:
    """Tell glibc to keep what is freed for the next allocation, at most 2 GiB at its end; call it once, at the start.

    The process's resident size then stays near its maximum.

    Returns:
        Whether the C library accepted it; False with another library than glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
