"""The config of the OREAL loss; no torch here."""

from __future__ import annotations

from pydantic import Field

from toolkit.functional.options import NotNegative
from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.policy import BaseRLLossConfig, PolicyLossOptions


class OrealLossConfig(BaseRLLossConfig):
    """OREAL: imitation of the tokens with A > 0, and a policy loss averaged separately over them and over the others.

    The names and defaults are XTuner's.
    """

    context = "toolkit.losses.oreal:OrealLossContext"

    policy_loss_cfg: PolicyLossOptions = Field(default_factory=lambda: {"loss_type": "vanilla"})
    """``loss_type``, the name of a registered policy loss, and the options of that loss."""
    positive_loss_factor: NotNegative = 1.0
    """Factor of both terms of the tokens with A > 0."""
    pos_sft_loss_weight: NotNegative = 1.0
    """Factor of their mean negative log-likelihood."""
    pos_policy_loss_weight: NotNegative = 1.0
    """Factor of their mean policy loss."""
    negative_loss_factor: NotNegative = 1.0
    """Factor of the mean policy loss of the tokens with A <= 0."""

    @property
    def aggregation(self) -> AggregationConfig:
        """The mean over tokens with A > 0 plus that over the others, with these factors."""
        return AggregationConfig(
            name="per_component",
            positive_weight=self.positive_loss_factor * self.pos_policy_loss_weight,
            negative_weight=self.negative_loss_factor,
        )

    @property
    def positive_nll_coef(self) -> float:
        """Factor of the mean negative log-likelihood of the tokens with A > 0."""
        return self.positive_loss_factor * self.pos_sft_loss_weight
