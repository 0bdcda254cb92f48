"""Rewards relative to the other sequences of the same prompt: GRPO and related estimators. S: sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from toolkit.functional.advantages.registry import register_advantage
from toolkit.functional.options import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

Singleton = Literal["zero", "raw"]
"""The advantage of a sequence alone in its group: 0, or its reward unchanged."""
StdOf = Literal["rewards", "residuals"]
"""Whether a deviation is that of the rewards, or the root mean square of the residuals."""


def scaled(
    r: RewardTerms,
    residual: Tensor,
    *,
    std: Literal["sample", "population", "leave_one_out", "none"],
    level: Literal["group", "batch"],
    std_of: StdOf,
    eps: float,
    singleton: Singleton,
) -> Tensor:
    """Return ``residual / (deviation + eps)``, [S], wide; `residual` itself with std="none"."""
    alone = r.is_alone & (singleton == "raw")
    kept = r.filled.where(alone, residual)
    if std == "none":
        return kept
    spread = r.spread(std, level, residual if std_of == "residuals" else None)
    divided = kept / (spread + eps)
    if level == "group":
        divided = (kept / (1 + eps)).where(alone, divided)
    # Without spread there is nothing to compare. With leave-one-out the others may be equal while the sequence differs.
    return divided.where((spread > 0) | alone, residual if std == "leave_one_out" else 0.0)


@register_advantage(
    "grpo",
    source="Shao et al. 2024, arXiv 2402.03300, section 4.1.2; level=batch: Liu et al. 2025, arXiv 2508.08221",
)
def grpo(
    r: RewardTerms,
    *,
    std: Literal["sample", "population", "none"] = "sample",
    level: Literal["group", "batch"] = "group",
    baseline: Literal["group", "batch", "none"] = "group",
    std_of: StdOf = "rewards",
    eps: Positive = 1e-4,
    singleton: Singleton = "zero",
) -> Tensor:
    """Reward minus the mean of its group, over the standard deviation of the group (GRPO).

    ``A = (R - mean) / (std + eps)``. The default choice. ``level=batch`` divides by the deviation of the whole batch
    (less weight for groups that are nearly all right or all wrong).

    Args:
        r: the rewards, [S].
        std: "sample" (divide by n - 1), "population" (by n) or "none".
        level: over what the deviation is taken.
        baseline: what is subtracted: the mean of the group, of the batch, or nothing.
        std_of: the deviation of the rewards around their mean, or of the residuals around 0.
        eps: added to the deviation; 1e-4 as in TRL (1e-8 in XTuner, 1e-6 in verl, SkyRL and ROLL, 1e-5 in AReaL).
        singleton: what a group of one gets: 0, or its reward over 1 + eps (verl, SkyRL).

    Returns:
        [S] advantages; 0 for a group whose rewards are all equal.
    """
    residual = r.residual(baseline)
    return r.result(scaled(r, residual, std=std, level=level, std_of=std_of, eps=eps, singleton=singleton))


@register_advantage(
    "dr_grpo",
    source="Liu et al. 2025, arXiv 2503.20783",
)
def dr_grpo(r: RewardTerms, *, singleton: Singleton = "zero") -> Tensor:
    """Reward minus the mean of its group, not divided (Dr. GRPO).

    ``A = R - mean``: easy and hard prompts get no extra weight. The paper's constant length normaliser is the
    aggregation of the loss, not part of this.

    Args:
        r: the rewards, [S].
        singleton: what a group of one gets: 0, or its reward (verl, SkyRL).

    Returns:
        [S] advantages.
    """
    return r.result(r.filled.where(r.is_alone & (singleton == "raw"), r.residual()))


@register_advantage(
    "rloo",
    source="Ahmadian et al. 2024, arXiv 2402.14740. The paper does not divide",
)
def rloo(
    r: RewardTerms,
    *,
    std: Literal["none", "sample", "population", "leave_one_out"] = "none",
    level: Literal["group", "batch"] = "group",
    baseline: Literal["group", "batch"] = "group",
    std_of: StdOf = "rewards",
    eps: Positive = 1e-4,
    singleton: Singleton = "zero",
) -> Tensor:
    """Reward minus the mean reward of the others of its group (RLOO).

    ``A_i = R_i - mean of R_j, j != i``: the baseline is independent of the sequence, so the gradient is unbiased.

    Args:
        r: the rewards, [S].
        std: also divide by a standard deviation: "leave_one_out" is that of the others (NeMo-RL), where it is not 0.
        level: over what the deviation is taken.
        baseline: the others of the group, or of the batch.
        std_of: the deviation of the rewards around their mean, or of the residuals around 0 (AReaL).
        eps: added to the deviation.
        singleton: what a group of one gets: 0, or its reward (XTuner, one of verl's two versions).

    Returns:
        [S] advantages.
    """
    residual = r.residual(baseline, leave_one_out=True)
    return r.result(scaled(r, residual, std=std, level=level, std_of=std_of, eps=eps, singleton=singleton))


@register_advantage(
    "maxrl",
    source="arXiv 2602.02710. Gives 0 where the divisor is 0",
)
def maxrl(
    r: RewardTerms,
    *,
    eps: NotNegative = 0.0,
    nonpositive_mean: Literal["zero", "divide"] = "zero",
    singleton: Singleton = "zero",
) -> Tensor:
    """Reward minus the mean of its group, over that mean (MaxRL).

    ``A = (R - mean) / (mean + eps)`` for rewards that are not negative: with rewards 0 and 1 a prompt solved once in n
    weighs n times as much, as in maximum likelihood.

    Args:
        r: the rewards, [S], not negative.
        eps: added to the mean; 0 as in prime-rl, 1e-6 in SkyRL.
        nonpositive_mean: what a group gets whose mean is 0 or less: 0, or the quotient unchanged (SkyRL: negative
            means flip the signs).
        singleton: what a group of one gets: 0, or its reward (SkyRL).

    Returns:
        [S] advantages.
    """
    mean = r.mean()
    divisor = mean + eps
    usable = (mean > 0) | (nonpositive_mean == "divide")
    advantages = (r.centred() / divisor).where(usable & (divisor != 0), 0.0)
    return r.result(r.filled.where(r.is_alone & (singleton == "raw"), advantages))


@register_advantage(
    "gpg",
    source="Chu et al. 2025, arXiv 2504.02546; counted=nonzero_rewards as in verl differs from it",
)
def gpg(
    r: RewardTerms,
    *,
    counted: Literal["varied_groups", "nonzero_rewards"] = "varied_groups",
    f_norm: Positive = 1.0,
    singleton: Singleton = "zero",
) -> Tensor:
    """Reward minus the mean of its group, scaled up to make up for sequences that do not count (GPG).

    ``A = alpha (R - mean) / f_norm`` with alpha = number of sequences / number of those counted.

    Args:
        r: the rewards, [S].
        counted: sequences of groups whose rewards differ (only they have a gradient), or those with a reward that is
            not 0 (verl).
        f_norm: a constant divisor.
        singleton: what a group of one gets: 0, or alpha times its reward over f_norm (verl).

    Returns:
        [S] advantages.
    """
    useful = r.known & (r.varies() if counted == "varied_groups" else r.filled != 0)
    alpha = r.known.sum() / useful.sum().clamp(min=1)
    centred = r.filled.where(r.is_alone & (singleton == "raw"), r.centred())
    return r.result(alpha.to(r.wide) * centred / f_norm)
