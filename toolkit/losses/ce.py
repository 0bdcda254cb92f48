"""Cross-entropy on labelled text. Legend: n scored tokens."""

from __future__ import annotations

from torch import Tensor

from toolkit.head import TokenScores
from toolkit.losses.config.ce import CELossConfig
from toolkit.losses.items import CELossContextInputItem
from toolkit.losses.kwargs import BaseLossKwargs
from toolkit.losses.scored import ScoredLossContext
from toolkit.metrics import Mean, Metric, Sum


class CELossKwargs(BaseLossKwargs):
    """Labels and their weights."""


class CELossContext(ScoredLossContext[CELossContextInputItem]):
    """``loss = sum_t weight_t * (-log pi(y_t))``."""

    item_cls, kwargs_cls, cfg_cls = CELossContextInputItem, CELossKwargs, CELossConfig

    def token_losses(self, scores: TokenScores, loss_kwargs: CELossKwargs) -> Tensor:
        """Return the negative log-probabilities [n]."""
        return -scores.logprobs

    def metrics_of(self, scores: TokenScores, loss_kwargs: CELossKwargs) -> dict[str, Metric]:
        """Return the mean negative log-probability and the number of tokens."""
        nll = Mean.of(-scores.logprobs)
        return {"nll": nll, "active_tokens": Sum(nll.den)}
