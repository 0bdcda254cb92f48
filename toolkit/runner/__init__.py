"""`LossRunner`: a loss on plain tensors, without items, kwargs and contexts."""

from toolkit.runner.items import FIELDS, RL_FIELDS
from toolkit.runner.loss_runner import LossRunner
from toolkit.runner.result import LossResult

__all__ = ["FIELDS", "RL_FIELDS", "LossResult", "LossRunner"]
