"""A controller that adjusts the coefficient of a KL penalty to hold the KL near a target; no torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from toolkit.errors import ConfigError, DataError

MAX_ERROR = 0.2
"""Bound on the relative error of one update, as in the paper."""


@dataclass(frozen=True)
class AdaptiveKL:
    """The coefficient of a KL penalty, adjusted in proportion to the distance of the observed KL from its target.

    Source: Ziegler et al. 2019, arXiv 1909.08593, section 2.2. Differs in writing the gain K_beta as
    num_samples / horizon, as the paper's code does, so the pace does not depend on the batch size.
    """

    coef: float
    """The current coefficient, >= 0; 0 stays 0."""
    target: float
    """The KL to hold, in nats; per sequence or per token, whichever is observed."""
    horizon: float
    """Samples over which the coefficient changes by about a fifth while the error is at its bound."""

    def __post_init__(self) -> None:
        for name, allowed in (("coef", self.coef >= 0), ("target", self.target > 0), ("horizon", self.horizon > 0)):
            value = getattr(self, name)
            if not (allowed and math.isfinite(value)):
                least = "at least 0" if name == "coef" else "above 0"
                raise ConfigError(f"{name}={value!r} of the adaptive KL coefficient must be a finite number {least}")

    def updated(self, observed_kl: float, num_samples: float) -> AdaptiveKL:
        """Return the controller of the next step: ``coef *= 1 + clip(kl / target - 1) * num_samples / horizon``.

        The clip is to +-0.2, so one extreme step cannot ruin the coefficient.

        Args:
            observed_kl: mean KL of the step over all ranks, in the unit of `target`; a sampled k1 may be negative.
            num_samples: samples of the step over all ranks, in the unit of `horizon`; fewer than 5 horizons, because
                otherwise the coefficient could reach 0 and stay there.

        Raises:
            DataError: `observed_kl` is not finite, or `num_samples` is negative or too large for the horizon.
        """
        if not math.isfinite(observed_kl):
            raise DataError(f"observed_kl={observed_kl!r} must be a finite number; find the first NaN of this step")
        gain = num_samples / self.horizon
        if not 0 <= gain * MAX_ERROR < 1:
            raise DataError(
                f"num_samples={num_samples!r} with horizon={self.horizon!r} could take the KL coefficient to 0 in one "
                f"step; it must be at least 0 and below {1 / MAX_ERROR:g} horizons: raise the horizon"
            )
        error = min(max(observed_kl / self.target - 1, -MAX_ERROR), MAX_ERROR)
        return replace(self, coef=self.coef * (1 + error * gain))
