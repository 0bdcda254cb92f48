"""The config of cross-entropy; no torch here."""

from __future__ import annotations

from typing import Literal

from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.term import LossTerm

CE_AGGREGATIONS = {"token": "token_mean", "sample": "seq_mean_token_mean", "square": "square"}
"""XTuner's names of the reductions of cross-entropy, and ours."""


class CELossConfig(BaseLossConfig):
    """Cross-entropy with the labels: supervised fine-tuning."""

    loss_reduction: Literal["token", "sample", "square"] = "token"
    """token: mean over tokens; sample: mean over sequences of their token means; square: weight 1/sqrt(length)."""

    context = "toolkit.losses.ce:CELossContext"

    @property
    def terms(self) -> tuple[LossTerm, ...]:
        """One, the negative log-probabilities."""
        return (LossTerm(name="nll", aggregation=CE_AGGREGATIONS[self.loss_reduction]),)
