"""The inputs of one forward of a loss, built from an item once the totals of the step are known.

Legend: B rows, T positions of a row, K columns of weights.
"""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from torch import Tensor

from toolkit.functional.segments import NO_SEQUENCE
from toolkit.losses.record import PerToken, TensorRecord


class BaseLossKwargs(TensorRecord):
    """What one forward of a loss needs. Declare further tensors as ``Annotated[Tensor, PerToken(pad=...)]``."""

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    """[1, T] or [B, T] int64."""
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Calibrated weight of each token, same shape; the loss is ``(loss_weight * token_losses).sum()``."""
    term_weights: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None
    """[.., T, K] the same for each weighting of the terms; None: there is one, in `loss_weight`."""
    importance: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Factor of the terms with ``use_correction``, 0 for a rejected token, without gradient; None: 1 everywhere."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)  # type: ignore[misc]
        raise AttributeError(
            f"{type(self).__name__} has no field {name!r}; declare {name}: Annotated[Tensor, PerToken(pad=0.0)] in the "
            "kwargs_cls of the context, and in its item_cls"
        )


class GRPOLossKwargs(BaseLossKwargs):
    """Everything the loss of one micro-batch needs; all fields [1, T] or [B, T]."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    candidate_ids: Annotated[Tensor | None, PerToken(pad=-1, trailing=1)] = None
    """[.., T, K] tokens whose log-probabilities are compared with another policy's; None: the whole vocabulary."""
    candidate_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=1)] = None
    """[.., T, K] the reference's or the teacher's."""
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    teacher_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    current_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    sequence_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    turn_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    group_ids: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    positions: Annotated[Tensor | None, PerToken(pad=0)] = None
    step_metrics: Any = None
    """Metrics that are known before the forward; reported once per micro-batch."""
    has_current: bool = False
    """Whether all corrections were applied before the forward, because the items had `current_logprobs`."""
    num_scored: int | None = None
    """Number of scored tokens that a loss of several tokens must get together; None: it may get pieces."""
    view_index: Annotated[Tensor | None, PerToken(pad=NO_SEQUENCE)] = None
    """int64, the index of each scored token among those of `global_view`, -1 elsewhere."""
    global_view: Any = None
    """A `GlobalView`: all tokens that the loss looks at, if some are outside this micro-batch's piece; else None."""

    def to(self, device: torch.device | str) -> Self:
        """Return a copy with every tensor on `device`, those of `global_view` included."""
        moved = super().to(device)
        return moved if self.global_view is None else moved.replace(global_view=self.global_view.to(device))
