"""Rewards relative to the other sequences of the same prompt: GRPO and related estimators, pass@k. S: sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import DocInfo, Ge

from toolkit.functional.advantages.registry import SequenceAdvantages, register_advantage
from toolkit.functional.options import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

Singleton = Annotated[Literal["zero", "raw"], DocInfo("what a group of one gets: 0, or its reward")]
Std = Annotated[Literal["sample", "population"], DocInfo('"sample" divides by n - 1, "population" by n')]
StdOrNone = Annotated[
    Literal["sample", "population", "none"],
    DocInfo('the deviation to divide by: "sample" (over n - 1), "population" (over n) or "none"'),
]
StdOf = Annotated[
    Literal["rewards", "residuals"],
    DocInfo("the deviation of the rewards around their mean, or of the residuals around 0"),
]
Level = Annotated[Literal["group", "batch"], DocInfo("over what the deviation is taken")]
Eps = Annotated[Positive, DocInfo("added to the deviation")]


def scaled(
    r: RewardTerms,
    residual: Tensor,
    *,
    std: Literal["sample", "population", "leave_one_out", "none"],
    level: Level = "group",
    std_of: StdOf = "rewards",
    eps: float,
    singleton: Singleton = "zero",
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
    std: StdOrNone = "sample",
    level: Level = "group",
    baseline: Literal["group", "batch", "none"] = "group",
    std_of: StdOf = "rewards",
    eps: Eps = 1e-4,
    singleton: Singleton = "zero",
) -> SequenceAdvantages:
    """Reward minus the mean of its group, over the standard deviation of the group (GRPO).

    ``A = (R - mean) / (std + eps)``, 0 for a group whose rewards are all equal. The default choice. ``level=batch``
    divides by the deviation of the whole batch (less weight for groups that are nearly all right or all wrong).

    Args:
        baseline: what is subtracted: the mean of the group, of the batch, or nothing.
        eps: 1e-4 as in TRL (1e-8 in XTuner, 1e-6 in verl, SkyRL and ROLL, 1e-5 in AReaL).
        singleton: the reward is over 1 + eps (verl, SkyRL).
    """
    residual = r.residual(baseline)
    return r.result(scaled(r, residual, std=std, level=level, std_of=std_of, eps=eps, singleton=singleton))


@register_advantage("dr_grpo", source="Liu et al. 2025, arXiv 2503.20783")
def dr_grpo(r: RewardTerms, *, singleton: Singleton = "zero") -> SequenceAdvantages:
    """Reward minus the mean of its group, not divided (Dr. GRPO).

    ``A = R - mean``: easy and hard prompts get no extra weight. The paper's constant length normaliser is the
    aggregation of the loss, not part of this.

    Args:
        singleton: the reward in verl and SkyRL.
    """
    return r.result(r.filled.where(r.is_alone & (singleton == "raw"), r.residual()))


@register_advantage("rloo", source="Ahmadian et al. 2024, arXiv 2402.14740. The paper does not divide")
def rloo(
    r: RewardTerms,
    *,
    std: Literal["none", "sample", "population", "leave_one_out"] = "none",
    level: Level = "group",
    baseline: Literal["group", "batch"] = "group",
    std_of: StdOf = "rewards",
    eps: Eps = 1e-4,
    singleton: Singleton = "zero",
) -> SequenceAdvantages:
    """Reward minus the mean reward of the others of its group (RLOO).

    ``A_i = R_i - mean of R_j, j != i``: the baseline is independent of the sequence, so the gradient is unbiased.

    Args:
        std: also divide by a standard deviation: "leave_one_out" is that of the others (NeMo-RL), where it is not 0.
        baseline: the others of the group, or of the batch.
        std_of: residuals in AReaL.
        singleton: the reward in XTuner and one of verl's two versions.
    """
    residual = r.residual(baseline, leave_one_out=True)
    return r.result(scaled(r, residual, std=std, level=level, std_of=std_of, eps=eps, singleton=singleton))


@register_advantage("maxrl", source="arXiv 2602.02710. Gives 0 where the divisor is 0")
def maxrl(
    r: RewardTerms,
    *,
    eps: NotNegative = 0.0,
    nonpositive_mean: Literal["zero", "divide"] = "zero",
    singleton: Singleton = "zero",
) -> SequenceAdvantages:
    """Reward minus the mean of its group, over that mean (MaxRL).

    ``A = (R - mean) / (mean + eps)`` for rewards that are not negative: with rewards 0 and 1 a prompt solved once in n
    weighs n times as much, as in maximum likelihood.

    Args:
        eps: added to the mean; 0 as in prime-rl, 1e-6 in SkyRL.
        nonpositive_mean: what a group gets whose mean is 0 or less: 0, or the quotient unchanged (SkyRL: negative
            means flip the signs).
        singleton: the reward in SkyRL.
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
) -> SequenceAdvantages:
    """Reward minus the mean of its group, scaled up to make up for sequences that do not count (GPG).

    ``A = alpha (R - mean) / f_norm`` with alpha = number of sequences / number of those counted.

    Args:
        counted: sequences of groups whose rewards differ (only they have a gradient), or those with a reward that is
            not 0 (verl).
        f_norm: a constant divisor.
        singleton: the reward is times alpha and over f_norm (verl).
    """
    useful = r.known & (r.varies() if counted == "varied_groups" else r.filled != 0)
    alpha = r.known.sum() / useful.sum().clamp(min=1)
    centred = r.filled.where(r.is_alone & (singleton == "raw"), r.centred())
    return r.result(alpha.to(r.wide) * centred / f_norm)


@register_advantage("opo", needs=("lengths",), source="Hao et al. 2025, arXiv 2505.23585")
def opo(r: RewardTerms, *, singleton: Singleton = "zero") -> SequenceAdvantages:
    """Reward minus the mean of its group weighted by length (OPO).

    ``A = R - sum(R len) / sum(len)``: the baseline of least variance if a gradient's norm grows with the length.

    Args:
        singleton: the reward in verl.
    """
    residual = r.centred(weights=r.require("lengths"))
    return r.result(r.filled.where(r.is_alone & (singleton == "raw"), residual))


@register_advantage("grpo_times_length", needs=("lengths",), source="XTuner v1, DrGRPOEstimator")
def grpo_times_length(
    r: RewardTerms,
    *,
    max_length: Positive = 32768.0,
    std: Std = "sample",
    eps: Eps = 1e-8,
) -> SequenceAdvantages:
    """GRPO's advantage times the length of the sequence over a constant.

    ``A = (R - mean) / (std + eps) * len / max_length``: what XTuner calls Dr. GRPO; with a token mean per sequence it
    undoes the division by the length. The paper of that name does not divide by the deviation: see dr_grpo.

    Args:
        max_length: the constant, in tokens; 32768 as in XTuner.
        eps: 1e-8 as in XTuner.
    """
    score = scaled(r, r.residual(), std=std, eps=eps)
    return r.result(score * r.require("lengths") / max_length)


@register_advantage("length_shaped", needs=("lengths",), source="prime-rl, the linear length penalty of its GRPO")
def length_shaped(
    r: RewardTerms,
    *,
    output_weight: NotNegative = 0.25,
    input_weight: NotNegative = 0.1,
    turns_weight: NotNegative = 0.1,
) -> SequenceAdvantages:
    """Reward minus a penalty for length that grows with the success of the group, centred.

    ``R' = R - mean(R) (w_out len / max len + w_in read / max read + w_turns turns / max turns)``, then
    ``A = R' - mean(R')``, means and maxima over the group: the more of a group succeeds, the more short answers are
    rewarded. Rewards that are equal and not 0 still differ by their lengths.

    Args:
        r: `input_lengths` and `num_turns` too if they differ within a group: a missing quantity counts as equal for all
            and cancels.
        output_weight: weight of the tokens written; 0.25 as in prime-rl.
        input_weight: weight of the tokens read; 0.1 as in prime-rl.
        turns_weight: weight of the turns; 0.1 as in prime-rl.
    """
    fraction = r.filled * 0
    weighted = ((output_weight, r.require("lengths")), (input_weight, r.input_lengths), (turns_weight, r.num_turns))
    for weight, amount in weighted:
        if amount is not None:
            known = amount.to(r.wide).where(r.known, 0.0)
            fraction = fraction + weight * known / r.largest(known).clamp(min=1)
    shaped = r.filled - r.mean() * fraction
    return r.result(r.with_rewards(shaped).centred())


@register_advantage(
    "pass_at_k",
    source="Chen et al. 2025, arXiv 2508.10751, analytic form. Differs in giving 0 where sigma is 0",
)
def pass_at_k(
    r: RewardTerms, *, k: Annotated[int, Ge(1)] = 4, threshold: float = 0.0, eps: NotNegative = 1e-6
) -> SequenceAdvantages:
    """Advantage of being in a random team of k that succeeds if one member does (analytic pass@k).

    With c of n right, ``rho = 1 - C(n-c, k) / C(n, k)`` and ``sigma = sqrt(rho (1 - rho))``: right ones get
    ``(1 - rho) / sigma``, wrong ones ``(1 - rho - C(n-c-1, k-1) / C(n-1, k-1)) / sigma``. Easy prompts count less, and
    wrong answers beside a right one are punished less, than in GRPO. 0 where no team or every team succeeds.

    Args:
        k: members of a team; a group smaller than k is one team.
        threshold: a reward above it is right.
        eps: added to sigma; 1e-6 as in XTuner.
    """
    count = r.count()
    is_right = (r.filled > threshold) & r.known
    wrong = count - r.total(is_right.to(r.wide))
    all_wrong = others_wrong = count * 0 + 1
    # C(w, k) / C(n, k) = prod (w - j) / (n - j), without a factorial that overflows; with n <= k sigma is 0.
    for j in range(k):
        factor = (wrong - j).clamp(min=0) / (count - j).clamp(min=1)
        all_wrong = all_wrong * factor
        others_wrong = others_wrong * factor if j > 0 else others_wrong
    sigma = ((1 - all_wrong) * all_wrong).sqrt()
    advantages = all_wrong.where(is_right, all_wrong - others_wrong) / (sigma + eps)
    return r.result(advantages.where(sigma > 0, 0.0))


@register_advantage("pass_at_k_margin", source="Tang et al. 2025, arXiv 2503.19595. The paper does not divide")
def pass_at_k_margin(r: RewardTerms, *, std: StdOrNone = "none", eps: Eps = 1e-6) -> SequenceAdvantages:
    """The best of a group gets its margin over the second best, all others 0 (pass@n by leave-one-out).

    ``A_i = max R - max of R_j, j != i``: what the best reward of the group owes to this sequence. 0 where the best
    two are equal, and for groups of one.

    Args:
        std: "sample" in verl by default.
        eps: 1e-6 as in verl.
    """
    rewards = r.filled.where(r.known, float("-inf"))
    margin = (rewards - r.largest_other(rewards)).clamp(min=0).where(r.known & ~r.is_alone, 0.0)
    return r.result(scaled(r, margin, std=std, eps=eps))
