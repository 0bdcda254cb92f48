"""The inputs of one forward of a loss, built from an item once the totals of the step are known.

Legend: B rows, T positions of a row, K columns of weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import Field
from torch import Tensor

from toolkit.distributed import counted_over
from toolkit.distributed.counting import Counted
from toolkit.errors import ConfigError, DataError, did_you_mean
from toolkit.functional.segments import NO_SEQUENCE
from toolkit.losses.record import PerToken, TensorRecord


@dataclass(frozen=True)
class Built:
    """What was known when the kwargs of a step were built."""

    settings: Mapping[str, Any]
    """`step_settings` of the config."""
    largest_label: int | None
    """Of the scored positions of the micro-batch; None: not known."""
    counted: Counted | None
    """Of the `counting_over` in which the step was counted; None: there was none."""
    versions: Mapping[str, tuple[int, int]]
    """Identity and version of each tensor by name: a change in place gives it another version."""


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

    built: Built | None = Field(default=None, repr=False)
    """What `build_batches_loss_kwargs` knew; None for kwargs that it did not make."""

    def remember(self, settings: Mapping[str, Any], largest_label: int | None) -> None:
        """Keep what `check_still` compares; called once, when the kwargs are complete."""
        versions = {name: (id(value), value._version) for name, value in self.tensors() if not value.is_inference()}
        self.__dict__["built"] = Built(settings, largest_label, counted_over(), versions)

    def check_still(self, settings: Mapping[str, Any]) -> int | None:
        """Check that the step is still the one that was built; return its largest label, None if not known.

        Args:
            settings: `step_settings` of the config of the context.

        Raises:
            ConfigError: the kwargs were built with a config that differs in what is fixed for a step.
            DataError: a tensor was changed in place since.
        """
        if self.built is None:
            return None
        if self.built.settings is not settings and self.built.settings != settings:
            raise ConfigError(_difference(self.built.settings, settings))
        for name, (identity, version) in self.built.versions.items():
            value = self.__dict__[name]
            if id(value) == identity and value._version != version:
                raise DataError(
                    f"{name} was changed in place after build_batches_loss_kwargs; the loss of the step would mix "
                    "old and new values. Build the kwargs again, or give the item a copy (.clone())"
                )
        return self.built.largest_label

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed, checked like a new record."""
        known = None if self.built is None else Built(self.built.settings, None, self.built.counted, {})
        return super().replace(**{"built": known, **changes})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            return super().__getattr__(name)  # type: ignore[misc]
        near = did_you_mean("shifted_labels" if name == "labels" else name, type(self).model_fields)
        raise AttributeError(
            f"{type(self).__name__} has no field {name!r}{near}; if it is your own, declare {name}: "
            "Annotated[Tensor, PerToken(pad=0.0)] in the kwargs_cls of the context, and in its item_cls"
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


def _difference(built: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    name = next(name for name in {**built, **settings} if built.get(name) != settings.get(name))
    missing = object()
    before, after = (
        "absent" if (value := each.get(name, missing)) is missing else repr(value) for each in (built, settings)
    )
    return (
        f"these kwargs were built with a config where {name} is {before}, but the context's config has {after}; their "
        "weights are those of the first: build the kwargs and make the context with one config"
    )
