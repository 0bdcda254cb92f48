"""How far off a computation in fp32 may be: the same one in float64, with noise where fp32 would round.

Monte Carlo arithmetic (Parker 1997): every operator's result is moved by up to half a unit in the last place of fp32, a
sum or product of matrices by what its roundings add up to. What comes out differs from the exact result as much as fp32
may, whatever the CPU, the order of its sums and the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNIT = 2.0**-24
"""The largest relative error of one rounding to fp32."""
DRAWS = 8


class Rounding(TorchDispatchMode):
    """Adds the rounding of fp32 to what operators return in float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor) or result.dtype != torch.float64 or func._schema.name in EXACT:
            return result
        if _shares_memory(result, args):
            return result
        size = _size(func._schema.name, result, args)
        # What is excluded is -inf, which has no rounding.
        return result + UNIT * size.nan_to_num(0, 0, 0) * torch.empty_like(result).uniform_(-1, 1)


EXACT = {
    f"aten::{name}"
    for name in (
        *("clone", "_to_copy", "gather", "index", "index_select", "where", "neg", "abs", "zeros_like", "ones_like"),
        *("zeros", "ones", "full", "full_like", "new_zeros", "masked_fill", "scatter", "clamp", "cat", "amax", "max"),
        *("maximum", "minimum", "relu", "empty_like", "uniform_", "new_full", "scalar_tensor", "gather_backward"),
    )
}
"""Operators that round nothing."""


def _shares_memory(result: Tensor, args: Any) -> bool:
    given = [arg for arg in args if isinstance(arg, Tensor)]
    return any(result.untyped_storage()._cdata == arg.untyped_storage()._cdata for arg in given)


def _size(name: str, result: Tensor, args: Any) -> Tensor:
    """Return how many units the error of one operator may be, in absolute numbers."""
    kind = name.removeprefix("aten::")
    if kind in ("mm", "bmm", "addmm"):
        left, right = args[-2:]
        products = left.abs() @ right.abs()
        return left.shape[-1] ** 0.5 * products + result.abs()
    if kind in ("sum", "mean"):
        (values, *rest) = args
        sums = values.abs().sum(*rest[:2]) if kind == "sum" else values.abs().mean()
        return max(values.numel() / max(result.numel(), 1), 1) ** 0.5 * sums
    if (
        kind == "_softmax"
    ):  # the largest logit is taken off first: an exponential is off by what rounds off its argument
        largest = args[0].masked_fill(args[0].isinf(), 0).abs().amax(-1, keepdim=True)
        return (largest + 2) * result
    return 2 * result.abs() if kind in ("exp", "log", "log1p", "expm1", "tanh", "pow") else result.abs()


def largest_error(compute: Callable[[], Any], error: Callable[[Any], float]) -> float:
    """Return the largest error over `DRAWS` computations with rounding.

    Args:
        compute: the computation, in float64.
        error: of what it returned.
    """
    errors = []
    for _ in range(DRAWS):
        with Rounding():
            rounded = compute()
        errors.append(error(rounded))
    return max(errors)
