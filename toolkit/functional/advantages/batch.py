"""Estimators that whiten over the batch: REINFORCE++, its baseline, GDPO. S: sequences, T: positions, K: rewards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import DocInfo

from toolkit.functional.advantages.group import Eps, Singleton, Std, scaled
from toolkit.functional.advantages.registry import SequenceAdvantages, TokenAdvantages, register_advantage
from toolkit.functional.options import Fraction, Positive

if TYPE_CHECKING:
    from toolkit.functional.rewards import RewardTerms

EpsTo = Annotated[Literal["variance", "std"], DocInfo("add eps to the variance, or to its root")]
Weighting = Annotated[
    Literal["token", "sequence"],
    DocInfo("whether the batch counts every token, so long sequences weigh more, or every sequence once"),
]


@register_advantage(
    "reinforce_pp",
    level="token",
    needs=("mask",),
    within_group=False,
    source="Hu et al. 2025, arXiv 2501.03262. The paper's KL penalty is the token reward, if wanted",
)
def reinforce_pp(
    r: RewardTerms,
    *,
    gamma: Fraction = 1.0,
    holes: Literal["carry", "reset"] = "carry",
    std: Std = "sample",
    eps: Positive = 1e-8,
    eps_to: EpsTo = "variance",
) -> TokenAdvantages:
    """Discounted return of each token, whitened over all tokens of the batch (REINFORCE++).

    ``G_t = r_t + gamma G_{t+1}``, ``A = (G - mean) / sqrt(var + eps)``. One sample per prompt is enough.

    Args:
        gamma: discount per scored token.
        holes: what tokens between the turns do to the return: it is carried over them undiscounted (verl), or starts
            again at 0, so a turn learns only from rewards before the next hole (SkyRL).
        eps: 1e-8 as in verl.
    """
    mask = r.require("mask")
    rewards = r.rewards_at(mask)
    running = rewards[:, 0] * 0
    returns = rewards * 0
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = mask[:, t]
        running = (rewards[:, t] + gamma * running).where(here, running if holes == "carry" else 0.0)
        returns[:, t] = running
    counted = mask & r.complete(mask).unsqueeze(-1)
    return r.result(r.whiten(returns, counted, std=std, eps=eps, eps_to=eps_to), counted)


@register_advantage("reinforce_pp_baseline", needs=("lengths",), source="Hu et al. 2025, arXiv 2501.03262")
def reinforce_pp_baseline(
    r: RewardTerms,
    *,
    weighting: Weighting = "token",
    std: Std = "sample",
    eps: Positive = 1e-8,
    eps_to: EpsTo = "variance",
    singleton: Literal["zero", "centred", "raw"] = "zero",
    baseline: Literal["group", "none"] = "group",
) -> SequenceAdvantages:
    """Reward minus the mean of its group, whitened over the batch (REINFORCE++-baseline).

    ``A' = R - mean``, then ``A = (A' - mean) / sqrt(var + eps)`` over the batch. A group whose rewards are all equal
    gets a small advantage where token weighting shifts the mean of the batch away from 0.

    Args:
        weighting: tokens in verl, OpenRLHF, slime and NeMo-RL.
        std: population in NeMo-RL.
        eps: 1e-8 as in verl.
        singleton: a group of one gets 0 and is skipped in the batch; or it counts with 0, "centred" on itself
            (NeMo-RL), or with its "raw" reward (verl).
        baseline: "none" whitens the rewards themselves.
    """
    residual = r.filled.where(r.is_alone & (singleton == "raw"), r.residual(baseline))
    counted = r.known & ~(r.is_alone & (singleton == "zero") & (baseline == "group"))
    weights = (r.require("lengths") if weighting == "token" else r.known).to(r.wide).where(counted, 0.0)
    return r.result(r.whiten(residual, weights, std=std, eps=eps, eps_to=eps_to))


@register_advantage("gdpo", needs=("lengths",), source="Liu et al. 2026, arXiv 2601.05242")
def gdpo(
    r: RewardTerms,
    *,
    std: Std = "sample",
    eps: Eps = 1e-8,
    weighting: Weighting = "sequence",
    whiten_std: Std = "sample",
    whiten_eps: Positive = 1e-8,
    whiten_eps_to: EpsTo = "std",
    singleton: Singleton = "zero",
) -> SequenceAdvantages:
    """GRPO's advantage of each reward by itself, summed with weights, whitened over the batch (GDPO).

    ``A' = sum_k w_k (R_k - mean_k) / (std_k + eps)`` over the group, then whitened: rewards of different scale, or that
    rarely differ, do not mask each other as they do when they are summed first. One of the K rewards that is NaN adds
    nothing to its sequence.

    Args:
        r: the rewards, [S, K] in `rewards_multi` with `reward_weights`; without them the one reward, [S]; the lengths
            in tokens, [S].
        std: of the group.
        eps: that of each group; 1e-8 as in ms-swift.
        weighting: sequences in ms-swift and TRL, tokens in verl.
        whiten_std: of the batch.
        whiten_eps: added to the variance of the batch, or to its root; 1e-8.
        whiten_eps_to: to the variance in verl.
        singleton: 0 is skipped in the batch, the reward is over 1 + eps (verl).
    """
    columns = r.filled.unsqueeze(-1) if r.rewards_multi is None else r.rewards_multi
    summed, compared = r.filled * 0, r.known & False
    for k, column in enumerate(columns.unbind(-1)):
        terms = r.with_rewards(column)
        score = scaled(terms, terms.residual(), std=std, eps=eps, singleton=singleton)
        summed = summed + (score if r.reward_weights is None else r.reward_weights[k] * score).where(terms.known, 0.0)
        compared = compared | (terms.known & ((singleton == "raw") | ~terms.is_alone))
    counted = r.known & compared
    weights = (r.require("lengths") if weighting == "token" else r.known).to(r.wide).where(counted, 0.0)
    return r.result(r.whiten(summed, weights, std=whiten_std, eps=whiten_eps, eps_to=whiten_eps_to))
