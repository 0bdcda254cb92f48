"""Our policy losses in SkyRL, as ``toolkit/<name>``; written from SkyRL 0.3.0.

from toolkit.integrations.skyrl import register
register()  # before the trainer starts; then trainer.algorithm.policy_loss_type=toolkit/gspo

Source: SkyRL 0.3.0, ``skyrl/backends/skyrl_train/utils/ppo_utils.py``: a policy loss returns a sum over the mask, whose
advantages were scaled before: the sums of all micro-batches then add up to the mean that ``loss_reduction`` names.
"""

from __future__ import annotations

from toolkit.integrations.skyrl.registration import TESTED as TESTED
from toolkit.integrations.skyrl.registration import register as register

__all__ = ["register"]
