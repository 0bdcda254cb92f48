"""One advantage per token: generalised advantage estimation, optimal token baseline. S: sequences, T: positions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import DocInfo

from toolkit.functional.advantages.group import Singleton
from toolkit.functional.advantages.registry import TokenAdvantages, register_advantage
from toolkit.functional.options import Fraction, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms

ZeroTail = Annotated[
    bool,
    DocInfo("no baseline where the longest sequence has more tokens than any other, and would be compared with itself"),
]
Alone = Annotated[Singleton, DocInfo("what a group of one gets: 0, or its return (verl)")]
WeightEps = Annotated[Positive, DocInfo("added to the sum of weights; 1e-8 as in verl")]


@register_advantage(
    "gae",
    level="token",
    needs=("mask", "values"),
    within_group=False,
    source="Schulman et al. 2015, arXiv 1506.02438, eq. 11-16",
)
def gae(
    r: RewardTerms,
    *,
    gamma: Fraction = 1.0,
    lam: Fraction = 0.95,
    holes: Literal["skip", "walk"] = "skip",
    whiten: bool = True,
    eps: Positive = 1e-8,
) -> TokenAdvantages:
    """Generalised advantage estimation with a critic (GAE).

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``. ``A + V``, not whitened, is the
    target of a critic.

    Args:
        gamma: discount per step.
        lam: 1 trusts the rewards, 0 the critic.
        holes: "skip": the next token is the next scored one (verl, NeMo-RL); "walk": tokens between the turns are steps
            like any other, with values that must be valid (SkyRL, ROLL, slime).
        whiten: to mean 0 and variance 1 over all scored tokens of the batch.
        eps: added to that variance; 1e-8 as in verl.
    """
    mask = r.require("mask")
    steps = mask if holes == "skip" else r.inside
    rewards, values = r.rewards_at(steps), r.at(steps, "values")
    advantages = rewards * 0
    following = next_value = rewards[:, 0] * 0
    for t in range(rewards.shape[1] - 1, -1, -1):
        here = steps[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        following = (delta + gamma * lam * following).where(here, following)
        next_value = values[:, t].where(here, next_value)
        advantages[:, t] = following
    counted = mask & r.complete(steps, "values").unsqueeze(-1)
    if whiten:
        advantages = r.whiten(advantages, counted, std="sample", eps=eps, eps_to="variance")
    return r.result(advantages, counted)


@register_advantage(
    "optimal_token_baseline",
    level="token",
    needs=("mask", "logprobs", "sum_pi_squared"),
    source="Li et al. 2026, arXiv 2602.07078; positions are those of the row, holes included",
)
def optimal_token_baseline(
    r: RewardTerms, *, zero_tail: ZeroTail = True, eps: WeightEps = 1e-8, singleton: Alone = "zero"
) -> TokenAdvantages:
    """Return minus the baseline of least variance at each position of the group (optimal token baseline).

    ``B_t = sum_i G_i,t W_i,t / sum_i W_i,t`` over the sequences scored at position t, with
    ``W_t = sum up to t of (1 - 2 pi + sum pi^2)``: how much a sequence's gradient has grown so far.
    """
    return _optimal(r, r.require("mask"), None, zero_tail, eps, singleton)


@register_advantage(
    "tir_optimal_token_baseline",
    level="token",
    needs=("mask", "logprobs", "sum_pi_squared"),
    source="Li et al. 2026, arXiv 2602.07078, tool-integrated reasoning",
)
def tir_optimal_token_baseline(
    r: RewardTerms, *, zero_tail: ZeroTail = True, eps: WeightEps = 1e-8, singleton: Alone = "zero"
) -> TokenAdvantages:
    """The optimal token baseline for several turns: position t is the t-th scored token.

    As optimal_token_baseline, but tool output between the turns does not shift the tokens that are compared.
    """
    mask = r.require("mask")
    order = (~mask).to(r.wide).argsort(dim=-1, stable=True)  # scored tokens first, in their order
    return _optimal(r, mask, order, zero_tail, eps, singleton)


def _optimal(
    r: RewardTerms, mask: Tensor, order: Tensor | None, zero_tail: bool, eps: float, singleton: Singleton
) -> Tensor:
    """Return the advantages, [S, T]; `order` [S, T] moves the tokens to the positions where they are compared."""
    known = r.complete(mask, "logprobs", "sum_pi_squared")
    scored = mask & known.unsqueeze(-1)
    returns = r.rewards_at(mask).flip(-1).cumsum(-1).flip(-1).where(scored, 0.0)
    probabilities = r.at(scored, "logprobs").clamp(max=0).exp()
    energy = (1 - 2 * probabilities + r.at(scored, "sum_pi_squared")).where(scored, 0.0).cumsum(-1).where(scored, 0.0)
    lengths = scored.sum(-1).to(r.wide)
    if order is not None:
        returns, energy = returns.gather(-1, order), energy.gather(-1, order)
    baseline = r.total(returns * energy) / (r.total(energy) + eps)
    if zero_tail:
        longest_other = r.largest_other(lengths).unsqueeze(-1)
        position = (baseline * 0 + 1).cumsum(-1) - 1
        is_tail = (position >= longest_other) & (lengths.unsqueeze(-1) > longest_other)
        baseline = baseline.masked_fill(is_tail, 0.0)
    alone = (r.total(known.to(r.wide)) < 2).unsqueeze(-1)
    advantages = (returns - baseline).where(~alone, returns if singleton == "raw" else 0.0)
    if order is not None:
        advantages = (advantages * 0).scatter(-1, order, advantages)
    return r.result(advantages, scored)
