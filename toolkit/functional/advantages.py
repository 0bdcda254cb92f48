"""From rewards to advantages. P prompts, G completions of each prompt (a group)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, std: str = "sample", eps: float = 1e-4) -> Tensor:
    """Compare each completion with the others of its own prompt.

    ``A = (R - mean) / (std + eps)`` over the group; without std: ``A = R - mean``. A group of one, or one whose
    rewards are all equal, gives 0.

    Args:
        rewards: [P, G] one reward per completion; NaN marks a reward that could not be computed: its completion
            gets advantage 0 and does not enter the group's statistics.
        std: "sample" (divide by G - 1, GRPO), "population" (by G) or "none" (Dr. GRPO).
        eps: added to the standard deviation; 1e-4 as in TRL.

    Returns:
        [P, G] advantages, finite always.

    Source: Shao et al. 2024, arXiv 2402.03300, section 4.1.2; std="none": Liu et al. 2025, arXiv 2503.20783.
    """
    rewards = rewards.float()
    known = rewards.isfinite()
    count = known.sum(-1, keepdim=True)
    filled = torch.where(known, rewards, 0.0)
    mean = filled.sum(-1, keepdim=True) / count.clamp(min=1)
    # A mean of equal floats may miss them by a rounding; that must not become an advantage.
    varies = _largest(rewards, known) > -_largest(-rewards, known)
    centred = torch.where(known & varies, rewards - mean, 0.0)
    if std == "none":
        return centred
    freedom = count - 1 if std == "sample" else count
    variance = centred.square().sum(-1, keepdim=True) / freedom.clamp(min=1)
    return centred / (variance.sqrt() + eps)


def _largest(rewards: Tensor, known: Tensor) -> Tensor:
    return torch.where(known, rewards, float("-inf")).amax(-1, keepdim=True)
