"""`LossRunner`: a loss on plain tensors or on a model, without items, kwargs and contexts; compared and diagnosed."""

from toolkit.runner.comparison import Comparison
from toolkit.runner.diagnosis import Diagnosis, diagnose
from toolkit.runner.items import FIELDS, RL_FIELDS
from toolkit.runner.loss_runner import LossRunner
from toolkit.runner.result import LossResult

__all__ = ["FIELDS", "RL_FIELDS", "Comparison", "Diagnosis", "LossResult", "LossRunner", "diagnose"]
