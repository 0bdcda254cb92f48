"""From rewards to advantages: one small file for each family of estimators; the registry loads every module here.

The modules do not import torch at the top, so the command line can check an estimator's options quickly. They only need
tensor methods and the methods of ``r`` (`RewardTerms`).
"""

from toolkit.functional.advantages.registry import Advantage, advantage, advantage_names, register_advantage

__all__ = ["Advantage", "advantage", "advantage_names", "register_advantage"]
