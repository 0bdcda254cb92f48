"""The gradient of clamps that were computed without a graph; no torch here, as in `functional.policy`. N: tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def with_gradient_where_equal(values: Tensor, inputs: Tensor) -> Tensor:
    """Return `values` [N], which clamps made of the detached `inputs` [N], with the gradient of these clamps.

    It is that of an input whose value stayed as it was, and 0 where it changed or is NaN. Backward takes 2 operations
    instead of 5 for a clamp, and of 13 for a choice between two.
    """
    return inputs.where(values == inputs, values)
