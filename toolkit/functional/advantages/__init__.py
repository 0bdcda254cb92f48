"""From rewards to advantages: one small file for each family of estimators; the registry loads every module here.

The modules import no torch at the top: tensor methods and the methods of ``r`` (`RewardTerms`) are all they need, and
the command line can then check an estimator's options in a moment.
"""

from toolkit.functional.advantages.registry import Advantage, advantage, advantage_names, register_advantage

__all__ = ["Advantage", "advantage", "advantage_names", "register_advantage"]
