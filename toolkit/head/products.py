"""The three matrix products of the head, each by the fastest library for it.

Legend: n tokens of a chunk, D hidden width, V vocabulary.

Measured on an AMD Zen 4 (fp32, n 512, D 1024, V 32768, CPU milliseconds): logits 500 with PyTorch's BLAS
(MKL), 426 with oneDNN over the full vocabulary, 345 in slabs of 4096 entries, 365 in slabs of 1024; gradient of the
inputs 422, 403, 349 and 380; of the weight 446 with either library. Slabs keep oneDNN's newly allocated output and its
copy of the weight small enough for the allocator to reuse: 24 MB in slabs of 4096, 6 MB in slabs of 1024.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SLAB = 1024
"""Vocabulary entries of one oneDNN product."""
LOW_PRECISION_SLAB = 16384
"""Vocabulary entries of one low-precision product of the weight gradient, before it is added up in fp32."""
SMALL = 2**24
"""Multiplications below which a call's overhead matters more than its speed."""


def logits_into(out: Tensor, inputs: Tensor, weight: Tensor) -> None:
    """Write ``inputs @ weight.T`` into `out` [n, V], with `inputs` [n, D] and `weight` [V, D]."""
    if not _by_onednn(inputs, weight):
        torch.mm(inputs, weight.t(), out=out)
        return
    for start in range(0, weight.shape[0], SLAB):
        slab = weight[start : start + SLAB]
        out[:, start : start + SLAB].copy_(_onednn(inputs, slab))


def input_gradient(logit_grads: Tensor, weight: Tensor) -> Tensor:
    """Return the product [n, D] of `logit_grads` [n, V] and `weight` [V, D]."""
    if not _by_onednn(logit_grads, weight):
        return torch.mm(logit_grads, weight)
    total = _onednn(logit_grads[:, :SLAB], weight[:SLAB].t())
    for start in range(SLAB, weight.shape[0], SLAB):
        span = slice(start, start + SLAB)
        total.add_(_onednn(logit_grads[:, span], weight[span].t()))
    return total


def add_weight_gradient(total: Tensor, logit_grads: Tensor, inputs: Tensor, *, is_first: bool, factor: float) -> None:
    """Add ``factor * logit_grads.T @ inputs`` to `total` [V, D]; overwrite it where `is_first`.

    `logit_grads` is [n, V], `inputs` is [n, D]. A low-precision product is added to a wider total slab by slab: its sum
    over chunks must not be rounded to bf16.
    """
    if total.dtype == logit_grads.dtype:
        torch.addmm(total, logit_grads.t(), inputs, beta=0 if is_first else 1, alpha=factor, out=total)
        return
    for start in range(0, total.shape[0], LOW_PRECISION_SLAB):
        span = slice(start, start + LOW_PRECISION_SLAB)
        product = torch.mm(logit_grads[:, span].t(), inputs)
        if is_first:
            total[span].copy_(product).mul_(factor)  # wide before the factor: fp16 would underflow
        else:
            total[span].add_(product, alpha=factor)


def _onednn(inputs: Tensor, weight: Tensor) -> Tensor:
    """Return ``inputs @ weight.T`` by oneDNN. A private operator of PyTorch: guarded by `_by_onednn`."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, None, "none", [], "")


def _by_onednn(inputs: Tensor, weight: Tensor) -> bool:
    return inputs.dtype == weight.dtype and slab_bytes(inputs.shape[0], weight, inputs.dtype) > 0


def slab_bytes(rows: int, weight: Tensor, dtype: torch.dtype) -> int:
    """Return the bytes that oneDNN returns for `rows` tokens and `weight` [V, D] in `dtype`; 0 if BLAS computes it."""
    is_plain = weight.device.type == "cpu" and dtype == torch.float32 and weight.is_contiguous()
    if not (is_plain and rows * weight.numel() >= SMALL and onednn_wins()):
        return 0
    return rows * min(SLAB, weight.shape[0]) * dtype.itemsize


@cache
def onednn_wins() -> bool:
    """Whether fp32 products go to oneDNN: on AMD processors, where MKL is slow. A fixed rule, so runs repeat bitwise.

    Tried once on a small product: the operator is private and may change.
    """
    if not (torch.backends.mkldnn.is_available() and _is_amd()):
        return False
    try:
        a, b = torch.arange(6.0).reshape(2, 3), torch.arange(12.0).reshape(4, 3)
        return torch.equal(_onednn(a, b), a @ b.t())
    except (AttributeError, RuntimeError, TypeError):
        return False


def _is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
