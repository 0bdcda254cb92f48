"""Estimators that use the length of a sequence. S: sequences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from toolkit.functional.advantages.group import Singleton, scaled
from toolkit.functional.advantages.registry import register_advantage
from toolkit.functional.options import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms


@register_advantage(
    "opo",
    needs=("lengths",),
    source="Hao et al. 2025, arXiv 2505.23585",
)
def opo(r: RewardTerms, *, singleton: Singleton = "zero") -> Tensor:
    """Reward minus the mean of its group weighted by length (OPO).

    ``A = R - sum(R len) / sum(len)``: the baseline of least variance if a gradient's norm grows with the length.

    Args:
        r: the rewards, [S], and the lengths in tokens, [S].
        singleton: what a group of one gets: 0, or its reward (verl).

    Returns:
        [S] advantages.
    """
    residual = r.centred(weights=r.require("lengths"))
    return r.result(r.filled.where(r.is_alone & (singleton == "raw"), residual))


@register_advantage(
    "grpo_times_length",
    needs=("lengths",),
    source="XTuner v1, DrGRPOEstimator",
)
def grpo_times_length(
    r: RewardTerms,
    *,
    max_length: Positive = 32768.0,
    std: Literal["sample", "population"] = "sample",
    eps: Positive = 1e-8,
) -> Tensor:
    """GRPO's advantage times the length of the sequence over a constant.

    ``A = (R - mean) / (std + eps) * len / max_length``: what XTuner calls Dr. GRPO; with a token mean per sequence it
    undoes the division by the length. The paper of that name does not divide by the deviation: see dr_grpo.

    Args:
        r: the rewards, [S], and the lengths in tokens, [S].
        max_length: the constant, in tokens; 32768 as in XTuner.
        std: "sample" (divide by n - 1) or "population" (by n).
        eps: added to the deviation; 1e-8 as in XTuner.

    Returns:
        [S] advantages.
    """
    score = scaled(r, r.residual(), std=std, level="group", std_of="rewards", eps=eps, singleton="zero")
    return r.result(score * r.require("lengths") / max_length)


@register_advantage(
    "length_shaped",
    needs=("lengths",),
    source="prime-rl, the linear length penalty of its GRPO",
)
def length_shaped(
    r: RewardTerms,
    *,
    output_weight: NotNegative = 0.25,
    input_weight: NotNegative = 0.1,
    turns_weight: NotNegative = 0.1,
) -> Tensor:
    """Reward minus a penalty for length that grows with the success of the group, centred.

    ``R' = R - mean(R) (w_out len / max len + w_in read / max read + w_turns turns / max turns)``, then
    ``A = R' - mean(R')``, means and maxima over the group: the more of a group succeeds, the more short
    answers are rewarded.

    Args:
        r: the rewards, [S], the lengths in tokens, [S]; `input_lengths` and `num_turns` if they differ within a group:
            a missing quantity counts as equal for all and cancels.
        output_weight: weight of the tokens written; 0.25 as in prime-rl.
        input_weight: weight of the tokens read; 0.1 as in prime-rl.
        turns_weight: weight of the turns; 0.1 as in prime-rl.

    Returns:
        [S] advantages; rewards that are equal and not 0 still differ by their lengths.
    """
    fraction = r.filled * 0
    weighted = ((output_weight, r.require("lengths")), (input_weight, r.input_lengths), (turns_weight, r.num_turns))
    for weight, amount in weighted:
        if amount is not None:
            known = amount.to(r.wide).where(r.known, 0.0)
            fraction = fraction + weight * known / r.largest(known).clamp(min=1)
    shaped = r.filled - r.mean() * fraction
    return r.result(r.with_rewards(shaped).centred())
