"""Two unrelated estimators for the chance that one of k tries succeeds. S: sequences, n: sequences of a group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import Ge

from toolkit.functional.advantages.group import scaled
from toolkit.functional.advantages.registry import register_advantage
from toolkit.functional.options import NotNegative, Positive

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.rewards import RewardTerms


@register_advantage(
    "pass_at_k",
    source="Chen et al. 2025, arXiv 2508.10751, analytic form. Differs in giving 0 where sigma is 0",
)
def pass_at_k(
    r: RewardTerms, *, k: Annotated[int, Ge(1)] = 4, threshold: float = 0.0, eps: NotNegative = 1e-6
) -> Tensor:
    """Advantage of being in a random team of k that succeeds if one member does (analytic pass@k).

    With c of n right, ``rho = 1 - C(n-c, k) / C(n, k)`` and ``sigma = sqrt(rho (1 - rho))``: right ones get
    ``(1 - rho) / sigma``, wrong ones ``(1 - rho - C(n-c-1, k-1) / C(n-1, k-1)) / sigma``. Easy prompts count less, and
    wrong answers beside a right one are punished less, than in GRPO.

    Args:
        r: the rewards, [S].
        k: members of a team; a group smaller than k is one team.
        threshold: a reward above it is right.
        eps: added to sigma; 1e-6 as in XTuner.

    Returns:
        [S] advantages; 0 for groups that are all wrong, or where every team succeeds.
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


@register_advantage(
    "pass_at_k_margin",
    source="Tang et al. 2025, arXiv 2503.19595. The paper does not divide",
)
def pass_at_k_margin(
    r: RewardTerms, *, std: Literal["none", "sample", "population"] = "none", eps: Positive = 1e-6
) -> Tensor:
    """The best of a group gets its margin over the second best, all others 0 (pass@n by leave-one-out).

    ``A_i = max R - max of R_j, j != i``: what the best reward of the group owes to this sequence.

    Args:
        r: the rewards, [S].
        std: also divide by the standard deviation of the group (verl does by default).
        eps: added to the deviation; 1e-6 as in verl.

    Returns:
        [S] advantages, not negative; 0 where the best two are equal, and for groups of one.
    """
    rewards = r.filled.where(r.known, float("-inf"))
    margin = (rewards - r.largest_other(rewards)).clamp(min=0).where(r.known & ~r.is_alone, 0.0)
    return r.result(scaled(r, margin, std=std, level="group", std_of="rewards", eps=eps, singleton="zero"))
