"""What one forward of a loss needs, made from an item once the whole step is known.

Legend: B rows, T positions of a row, K columns of weights.
"""

from __future__ import annotations

from typing import Annotated, Any

from torch import Tensor

from toolkit.losses.fields import PerToken, TensorRecord


class BaseLossKwargs(TensorRecord):
    """What one forward of a loss needs. Declare further tensors as ``Annotated[Tensor, PerToken(pad=...)]``."""

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    """[1, T] or [B, T] int64."""
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of each token, same shape; the loss is ``(loss_weight * token_losses).sum()``."""
    term_weights: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None
    """[.., T, K] the same for each way in which terms count; None: there is one, and `loss_weight` has it."""
    importance: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Factor of the terms with ``use_correction``, 0 for a rejected token, without gradient; None: 1 everywhere."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)  # type: ignore[misc]
        raise AttributeError(
            f"{type(self).__name__} has no field {name!r}; declare {name}: Annotated[Tensor, PerToken(pad=0.0)] in the "
            "kwargs_cls of the context, and in its item_cls"
        )
