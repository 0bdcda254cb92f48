"""Why a sampler's log-probabilities differ from a trainer's: the kind of fault, from the arrays or with the model."""

from toolkit.runner.diagnosis.arrays import diagnose
from toolkit.runner.diagnosis.outcome import KINDS, Diagnosis

__all__ = ["KINDS", "Diagnosis", "diagnose"]
