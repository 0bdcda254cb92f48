"""An advantage estimator with verl's signature.

Legend: S responses, T positions of a response.

Source: verl 0.9.1, ``verl/trainer/ppo/ray_trainer.py``, compute_advantage.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ConfigError
from toolkit.functional.advantages.registry import advantage
from toolkit.functional.rewards import RewardTerms
from toolkit.integrations.verl.options import ADVANTAGE, advantage_options

AVAILABLE = frozenset({"lengths", "mask", "token_rewards", "greedy_rewards"})
"""Fields of `RewardTerms` that verl gives to an estimator of another project."""


@torch.no_grad()
def compute_advantage(
    name: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    reward_baselines: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Return advantages [S, T], 0 where masked, and the same as returns.

    Args:
        name: of the estimator.
        token_level_rewards: [S, T]; their sum is the reward of a response.
        response_mask: [S, T].
        config: verl's ``AlgoConfig``; ``norm_adv_by_std_in_grpo=False`` means ``std=none``.
        index: [S] the prompt of each response.
        reward_baselines: [S] rewards of greedy responses.
        others: ignored.

    Raises:
        ConfigError: the estimator compares the responses of a prompt, but there is no `index`; or an option is wrong.
    """
    estimator, mask = advantage(name), response_mask.bool()
    options = dict(advantage_options(os.environ.get(ADVANTAGE, "")))
    is_plain = config is not None and config.get("norm_adv_by_std_in_grpo", True) is False
    if is_plain and name == "grpo":
        options.setdefault("std", "none")
    if index is None and estimator.within_group:
        raise ConfigError(f"toolkit/{name} compares the responses of a prompt, but the batch has no uid")
    count = len(token_level_rewards)
    groups: dict[Any, int] = {}
    ids = range(count) if index is None else [groups.setdefault(each, len(groups)) for each in index]
    terms = RewardTerms(
        rewards=token_level_rewards.sum(-1),
        group_ids=torch.tensor(list(ids), dtype=torch.int64, device=mask.device),
        mask=mask,
        lengths=mask.sum(-1),
        token_rewards=token_level_rewards,
        greedy_rewards=reward_baselines,
    )
    values = estimator.compute(terms, **options).to(token_level_rewards.dtype)
    values = values.unsqueeze(-1) * mask if values.dim() == 1 else values * mask
    return values, values
