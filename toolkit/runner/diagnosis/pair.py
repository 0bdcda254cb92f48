"""Two arrays of log-probabilities as rows of compared values, and the statistics of their difference.

Legend: B rows, T positions, n values of one row or of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import DataError, a_type
from toolkit.runner.arguments import as_tensor

FEWEST = 16
"""Values below which a difference may be chance."""


@dataclass(frozen=True)
class Pair:
    """Log-probabilities of the same tokens by a sampler and a trainer."""

    rollout: Tensor
    """[B, T] float64, as the sampler reported them."""
    trainer: Tensor
    """[B, T] float64."""
    mask: Tensor
    """[B, T] bool, the values that are compared."""
    dropped: int = 0
    """Values that were to be compared and are NaN or infinite on one side."""

    @cached_property
    def rows(self) -> list[tuple[Tensor, Tensor]]:
        """The compared values of each row, [n] each."""
        return [(r[m], t[m]) for r, t, m in zip(self.rollout, self.trainer, self.mask, strict=True)]

    @cached_property
    def r(self) -> Tensor:
        """[n] the sampler's values."""
        return self.rollout[self.mask]

    @cached_property
    def t(self) -> Tensor:
        """[n] the trainer's values."""
        return self.trainer[self.mask]

    @cached_property
    def mean_difference(self) -> float:
        """Mean |r - t| in nats; 0 without values."""
        return _mean((self.r - self.t).abs())

    def without(self, left_out: Tensor) -> Pair:
        """Return the pair without the values at `left_out`, [B, T] bool."""
        return Pair(self.rollout, self.trainer, self.mask & ~left_out)

    def map(self, change: Callable[[Tensor], Tensor]) -> Pair:
        """Return the pair with other values of the sampler."""
        return Pair(change(self.rollout), self.trainer, self.mask)

    def at_lag(self, lag: int) -> float:
        """Mean |r - t| in nats of the sampler's values against the trainer's `lag` values later in the same row."""
        parts = [
            (r[: len(r) - lag] - t[lag:]) if lag >= 0 else (r[-lag:] - t[: len(t) + lag])
            for r, t in self.rows
            if len(r) > abs(lag)
        ]
        return _mean(torch.cat(parts).abs()) if parts else float("inf")

    @cached_property
    def correlation(self) -> float:
        """Of r and t; 1 where one of them is constant."""
        r, t = self.r - self.r.mean(), self.t - self.t.mean()
        scale = (r.square().sum() * t.square().sum()).sqrt()
        return float((r * t).sum() / scale) if float(scale) > 0 else 1.0

    @cached_property
    def share_below(self) -> float:
        """Share of the difference where the sampler is below the trainer: 0.5 if both sides are alike."""
        d = self.r - self.t
        return float(d.clamp(max=0).abs().sum() / d.abs().sum().clamp(min=1e-30))

    @cached_property
    def explained_by_value(self) -> float:
        """Share of the variance of r - t that the sampler's value alone explains, over its quantiles."""
        d = (self.r - self.t)[self.r.argsort()]
        bins = d.tensor_split(max(2, min(12, len(d) // 12)))
        within = sum(float((part - part.mean()).square().sum()) for part in bins if len(part))
        return 1 - within / max(float((d - d.mean()).square().sum()), 1e-30)

    @cached_property
    def slope(self) -> float:
        """Of the regression of t on r: near the temperature if the sampler had another one."""
        r, t = self.r - self.r.mean(), self.t - self.t.mean()
        return float((r * t).sum() / r.square().sum().clamp(min=1e-30))

    @cached_property
    def early_over_late(self) -> float:
        """Mean |r - t| of the first four values of a row over that of the values after the twelfth; 1 if unknown."""
        first = [(r - t)[:4].abs() for r, t in self.rows]
        later = [(r - t)[12:].abs() for r, t in self.rows if len(r) > 12]
        if not later:
            return 1.0
        return _mean(torch.cat(first)) / max(_mean(torch.cat(later)), 1e-30)

    def on_grid(self, dtype: torch.dtype) -> bool:
        """Whether all values of the sampler, and few of the trainer's, are numbers of a narrow `dtype`."""
        is_sampler, is_trainer = (values == values.to(dtype).to(values.dtype) for values in (self.r, self.t))
        return len(self.r) >= FEWEST and bool(is_sampler.all()) and float(is_trainer.double().mean()) < 0.5


def pair_of(rollout: Any, trainer: Any, mask: Any) -> Pair:
    """Return the pair of two arrays.

    Args:
        rollout: [B, T] or [T] log-probabilities in nats; a tensor, an array or a list; NaN where not reported.
        trainer: alike.
        mask: alike, 1 at the values to compare; None: where both are finite.

    Raises:
        DataError: shapes differ, they are not numbers, or the mask holds other values than 0 and 1.
    """
    arrays = {}
    for name, value in (("rollout_logprobs", rollout), ("trainer_logprobs", trainer), ("mask", mask)):
        if value is None and name == "mask":
            continue
        array = as_tensor(name, value, torch.device("cpu"))
        if not isinstance(array, Tensor) or array.dim() not in (1, 2):
            what = list(array.shape) if isinstance(array, Tensor) else a_type(value)
            raise DataError(f"{name} is {what}; give one value for each token, [B, T] or [T]")
        arrays[name] = array.detach().cpu().reshape(-1, array.shape[-1])
    shape = arrays["rollout_logprobs"].shape
    for name, array in arrays.items():
        if array.shape != shape:
            raise DataError(
                f"{name} has shape {list(array.shape)}, but rollout_logprobs has {list(shape)}; both arrays (and the "
                "mask) must hold one value for each token of the same rows"
            )
    values, scores = arrays["rollout_logprobs"].double(), arrays["trainer_logprobs"].double()
    is_known, is_both = scores.isfinite(), scores.isfinite() & values.isfinite()
    if "mask" not in arrays:
        return Pair(values, scores, is_both, int((~is_both).sum()))
    mask = arrays["mask"].bool()
    strange = arrays["mask"][arrays["mask"] != mask]
    if len(strange):
        raise DataError(
            f"mask holds {strange[0].item()}; give booleans, or 1 at the tokens to compare and 0 at the others (token "
            "ids are given by name: ids=...)"
        )
    return Pair(values, scores, mask & is_known, int((mask & ~is_both).sum()))


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else 0.0
