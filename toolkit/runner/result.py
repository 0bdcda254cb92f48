"""What a `LossRunner` returns, and what it says to those who take it for a tensor, a number, a tuple or a dict."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from toolkit.display import html_table
from toolkit.errors import DataError
from toolkit.metrics import Metrics, to_floats
from toolkit.runner.arguments import check_has_graph

UNITS = {
    "nats": ("kl", "entropy", "log_ratio_abs", "mismatch"),
    "share": ("fraction", "clamped", "rejected", "share"),
    "tokens": ("tokens", "denominator"),
    "sequences": ("sequences",),
}
"""Units, and parts of the names of metrics that have them."""
SHARES = ("zero_advantage_tokens", "zero_advantage_sequences", "rollout_kept", "rollout_kept_sequences")
"""Metrics that are shares, whatever their names end in."""


def unit_of(name: str) -> str:
    """Return the unit of a metric; empty where it has none, such as a ratio, or is not known."""
    if name.endswith("_loss") or name.startswith("ratio"):
        return ""
    if name in SHARES:
        return "share"
    if name.endswith(("tokens", "sequences")):
        return name.rpartition("_")[2]
    return next((unit for unit, parts in UNITS.items() if any(part in name for part in parts)), "")


class NotATensor(DataError, AttributeError, TypeError):
    """A result is used as if it were the loss, a tuple or a dict; also the errors that Python raises for that."""


class NotATuple:
    """Base of a result: what it is not answers with what to write."""

    if not TYPE_CHECKING:  # type checkers report these themselves

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_"):  # a protocol of Python or IPython
                raise AttributeError(name)
            raise NotATensor(
                f"a LossResult has no {name}; its loss is result.loss, so write result.loss.{name}"
                if hasattr(Tensor, name)
                else f"a LossResult has no {name}; it has loss, metrics, raw_metrics and backward()"
            )

        def __getitem__(self, key: Any) -> Any:
            how = f"result.metrics[{key!r}] is a number of it" if isinstance(key, str) and key != "loss" else ""
            raise NotATensor(
                "a LossResult is not a tuple or a dict; write loss, metrics = result.loss, result.metrics"
                f"{'; ' if how else ''}{how}"
            )

        def _computed(self, other: Any) -> Any:
            raise NotATensor(
                "a LossResult is not a number; its loss is result.loss. It is averaged already: do not divide it by a "
                "number of micro-batches or ranks, give all micro-batches to runner.step([...], forward)"
            )

        def _number(self, *_: Any) -> Any:
            raise NotATensor("a LossResult is not a number; its loss is result.loss, so write result.loss.item()")

        __float__ = __int__ = _number

        def __format__(self, spec: str) -> str:
            return self._number() if spec else str(self)

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotATensor("a LossResult is not a tensor; its loss is result.loss")

        __truediv__ = __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = _computed


@dataclass(frozen=True)
class LossResult(NotATuple):
    """A loss and its metrics: ``loss, metrics = result.loss, result.metrics``."""

    loss: Tensor
    """Scalar; with a live graph when it comes from a call, detached when it comes from `LossRunner.step`."""
    raw_metrics: Metrics
    """Mergeable metrics by name, still on the device."""
    is_of_step: bool = field(default=False, repr=False)
    """Whether it comes from `LossRunner.step`, which has already accumulated the gradients."""
    _reason: str = field(default="", repr=False)
    """Why the loss has no gradient, if it has none."""

    @property
    def metrics(self) -> dict[str, float]:
        """The metrics as numbers; NaN where nothing was measured."""
        return to_floats(self.raw_metrics)

    def backward(self) -> None:
        """Call ``loss.backward()``.

        Raises:
            DataError: nothing that the loss was computed from requires a gradient, or it comes from `LossRunner.step`.
        """
        if self.is_of_step:
            raise DataError(
                "step() has already accumulated the gradients of its batches; leave out backward() and call "
                "optimizer.step()"
            )
        check_has_graph(self.loss, "backward()", self._reason)
        try:
            self.loss.backward()
        except RuntimeError as error:
            if "second time" not in str(error):
                raise
            raise DataError(
                "backward() was called twice: the first call freed the graph; call the model and the runner again"
            ) from None

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return name, value and unit of the metrics, sorted by name, without those that were not measured."""
        values = {name: value for name, value in self.metrics.items() if name != "loss" and value == value}
        return [(name, f"{values[name]:.4g}", unit_of(name)) for name in sorted(values)]

    def _repr_html_(self) -> str:
        rows = [("loss", f"{float(self.loss.detach()):.6g}", ""), *self._rows()]
        note = "gradients are accumulated" if self.is_of_step else ""
        return html_table("LossResult", ("", "value", "unit"), rows, note=note)

    def __repr__(self) -> str:
        lines = [f"  {name}={value} {unit}".rstrip() for name, value, unit in self._rows()]
        return "\n".join([f"LossResult(loss={float(self.loss.detach()):.6g}", *lines, ")"])
