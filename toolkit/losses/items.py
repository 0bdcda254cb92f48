"""What a user hands in: one item for each micro-batch.

Legend: B rows, T positions of a row. Labels are already shifted: position t of every field speaks of the token that
the model predicts from position t, i.e. of token t + 1 of the text.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from toolkit.errors import DataError
from toolkit.losses.fields import PerToken, TensorRecord


class LossContextInputItem(TensorRecord):
    """The base of all items: labels, and a check of every per-token field against them.

    A field that holds a tensor never changes. One that is still None may be filled once (the interface assigns
    ``item.old_logprobs`` after computing it); the check runs then, too.
    """

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    """[1, T] packed or [B, T] padded, int64; `ignore_idx` (-100) where nothing is scored."""

    def model_post_init(self, context: Any, /) -> None:
        """Check labels and fields, and bring broadcast ones to the shape of the labels."""
        labels = self.shifted_labels
        if labels.dim() not in (1, 2) or labels.dtype not in (torch.int64, torch.int32):
            raise DataError(
                f"shifted_labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must be int64 of shape "
                "[1, T] (packed) or [B, T] (padded)"
            )
        self.__dict__["shifted_labels"] = labels.long()
        for name, value in self.tensors():
            if name != "shifted_labels":
                self.__dict__[name] = self._fitted(name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in type(self).model_fields and getattr(self, name, None) is None and isinstance(value, Tensor):
            self.__dict__[name] = self._fitted(name, value)
            return
        if name in type(self).model_fields and getattr(self, name, None) is None:
            raise DataError(f"{type(self).__name__}.{name} must be a tensor, not {type(value).__name__}")
        if name in type(self).model_fields:
            raise DataError(
                f"{type(self).__name__}.{name} is set and does not change; item.replace({name}=...) gives a new item"
            )
        raise DataError(f"{type(self).__name__} has no field {name!r}; it has: {', '.join(type(self).model_fields)}")

    def _fitted(self, name: str, value: Tensor) -> Tensor:
        """Return `value` in the shape of the labels: given so, or [T] for every row, or [B, 1] for a whole row."""
        shape = self.shifted_labels.shape
        fits = value.shape == shape or (len(shape) == 2 and value.shape in (shape[1:], torch.Size([shape[0], 1])))
        if not fits:
            raise DataError(
                f"{name} has shape {list(value.shape)}, but shifted_labels has {list(shape)}; allowed are "
                f"{list(shape)}, [{shape[-1]}] and [{shape[0]}, 1]"
            )
        if not value.is_floating_point():
            raise DataError(f"{name} has dtype {value.dtype}; it must be a floating-point tensor")
        return value.expand(shape)


class CELossContextInputItem(LossContextInputItem):
    """Labels, for cross-entropy."""


class RLLossContextInputItem(LossContextInputItem):
    """All materials of a policy loss. Masked positions may hold anything, NaN included."""

    advantages: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """[1, T] or [B, T]; [T] and [B, 1] broadcast."""
    old_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Log-probabilities before this optimizer step, in nats; None: on-policy, the current ones detached."""
    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Log-probabilities of the reference policy, in nats; needed with ``use_kl_loss``."""
    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    """Log-probabilities as the sampler reported them, in nats; reported as a metric, not trained on."""
