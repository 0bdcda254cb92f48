"""The configs of all losses and of what they consist of; no torch here."""

from toolkit.losses.config.aggregation import AggregationConfig
from toolkit.losses.config.base import BaseLossConfig
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.config.correction import CorrectionConfig
from toolkit.losses.config.logprob_spec import LogprobSpec
from toolkit.losses.config.opd import OPDLossConfig
from toolkit.losses.config.oreal import OrealLossConfig
from toolkit.losses.config.policy import BaseRLLossConfig, GRPOLossConfig
from toolkit.losses.config.term import LossTerm

__all__ = [
    "AggregationConfig",
    "BaseLossConfig",
    "BaseRLLossConfig",
    "CELossConfig",
    "CorrectionConfig",
    "GRPOLossConfig",
    "LogprobSpec",
    "LossTerm",
    "OPDLossConfig",
    "OrealLossConfig",
]
