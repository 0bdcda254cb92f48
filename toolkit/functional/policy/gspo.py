"""One clipped ratio per sequence (GSPO, LUSPO) or per turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, ClipHigh, ClipLow
from toolkit.functional.policy.clip import clipped_surrogate
from toolkit.functional.policy.facts import SEQUENCE, LossFacts
from toolkit.functional.policy.registry import register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "gspo",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A s, -A clip(s, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; s = exp(mean over the sequence of log(pi / pi_{anchor}))"
    "[<?average_advantages>; A is the mean of the sequence's]",
    facts=LossFacts(
        ratio=f"s, {SEQUENCE}",
        gradient="flows through the mean: -A s / n for each of a sequence's n tokens; 0 for all of them where the "
        "clip binds",
        source="Zheng et al. 2025, arXiv 2507.18071, eq. 5-7",
        differs="The paper averages over sequences (seq_mean_token_mean); a mean over tokens would count long "
        "sequences more",
    ),
)
def gspo(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 3e-4,
    cliprange_high: ClipHigh = 4e-4,
    clip_ratio_c: AboveOne | None = None,
    anchor: Anchor = "old",
    average_advantages: bool = False,
) -> Tensor:
    """Clip the geometric mean of the probability ratios of a sequence.

    ``loss = max(-A s, -A clip(s, 1 - cliprange_low, 1 + cliprange_high))`` for every token of a sequence, with
    ``s = exp(mean over the sequence of log pi_theta - log pi_old)``. The gradient flows through the mean.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low; 3e-4 as in the paper, because s moves far less than r.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 4e-4 as in the paper.
        clip_ratio_c: bound of a dual clip of s where A < 0; None: no dual clip, as in the paper.
        anchor: what the ratio divides by.
        average_advantages: whether A is the mean of the sequence's (AReaL); without effect where they are equal.

    Returns:
        [N] surrogate to minimise, the same for all tokens of a sequence with one advantage. Reports the fraction of
        tokens at each bound where it binds.
    """
    return clipped_surrogate(
        t,
        t.sequence_ratio(anchor),
        t.segment_mean(t.advantages) if average_advantages else t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )


@register_policy_loss(
    "gspo_token",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A s_t, -A clip(s_t, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; s_t = sg(s) pi / sg(pi), s = exp(mean over the sequence of log(pi / pi_{anchor}))",
    facts=LossFacts(
        ratio=f"s, {SEQUENCE} of each token alone",
        gradient="-A s for each token with its own A; with one A per sequence and a mean per sequence the same as "
        "gspo's",
        source="Zheng et al. 2025, arXiv 2507.18071, eq. 13-14",
    ),
)
def gspo_token(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 3e-4,
    cliprange_high: ClipHigh = 4e-4,
    clip_ratio_c: AboveOne | None = None,
    anchor: Anchor = "old",
) -> Tensor:
    """Clip the sequence's ratio as GSPO does, but let each token's gradient carry its own advantage.

    ``loss = max(-A s_t, -A clip(s_t, 1 - cliprange_low, 1 + cliprange_high))`` with ``s_t = sg(s) pi / sg(pi)``: the
    value of s, the gradient of the token alone (sg: no gradient). The loss of GSPO, and with one advantage per sequence
    and a mean per sequence also its gradient; for advantages that differ from token to token.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low; 3e-4 as in the paper.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 4e-4 as in the paper.
        clip_ratio_c: bound of a dual clip of s where A < 0; None: no dual clip, as in the paper.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise. Reports the fraction of tokens at each bound where it binds.
    """
    log_ratio = t.segment_mean(t.logprobs - t.anchor_logprobs(anchor)).detach()
    return clipped_surrogate(
        t,
        t.bounded(log_ratio + t.logprobs - t.logprobs.detach()).exp(),
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )


@register_policy_loss(
    "segment_ratio",
    scope="sequence",
    formula="max(-A u, -A clip(u, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; u = exp(mean over the turn of log(pi / pi_{anchor}))",
    facts=LossFacts(
        ratio="u, one for a turn, is clipped and carries the gradient",
        gradient="flows through the mean of the turn; where the clip binds, the turn has 0",
        source="ROLL's ``ratio_type=segment``; after Zheng et al. 2025, arXiv 2507.18071",
    ),
)
def segment_ratio(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: AboveOne | None = None,
    anchor: Anchor = "old",
) -> Tensor:
    """Clip the geometric mean of the probability ratios of a turn: GSPO for episodes of many turns.

    ``loss = max(-A u, -A clip(u, 1 - cliprange_low, 1 + cliprange_high))`` with
    ``u = exp(mean over the turn of log pi_theta - log pi_old)``; a turn is a run of scored tokens. The gradient flows
    through the mean.

    Args:
        t: the tensors of the selected tokens, [N]; needs turns.
        cliprange_low: the ratio's floor is 1 - cliprange_low; 0.2 as in ROLL.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 0.2 as in ROLL.
        clip_ratio_c: bound of a dual clip of u where A < 0; None: no dual clip; 1.4 where ROLL turns it on.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise. Reports the fraction of tokens at each bound where it binds.
    """
    return clipped_surrogate(
        t,
        t.turn_ratio(anchor),
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )


@register_policy_loss(
    "luspo",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="n max(-A s, -A clip(s, 1 - {cliprange_low}, 1 + {cliprange_high})); "
    "s = exp(mean over the sequence's n tokens of log(pi / pi_{anchor}))",
    facts=LossFacts(
        ratio=f"s, {SEQUENCE}",
        gradient="gspo's times the length n: -A s for each token; where the clip binds 0",
        source="LUSPO, arXiv 2602.05261",
    ),
)
def luspo(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 2e-3,
    cliprange_high: ClipHigh = 2.5e-3,
    anchor: Anchor = "old",
) -> Tensor:
    """Multiply GSPO's loss by the length of the sequence: no token of a long sequence counts less.

    ``loss = n max(-A s, -A clip(s, 1 - cliprange_low, 1 + cliprange_high))`` with n the number of the sequence's tokens
    and ``s = exp(mean over the sequence of log pi_theta - log pi_old)``.

    Args:
        t: the tensors of the selected tokens, [N].
        cliprange_low: the ratio's floor is 1 - cliprange_low; 2e-3 as in TRL's documentation.
        cliprange_high: the ratio's ceiling is 1 + cliprange_high; 2.5e-3 as in TRL's documentation.
        anchor: what the ratio divides by.

    Returns:
        [N] surrogate to minimise, the same for all tokens of a sequence with one advantage: a mean per sequence then
        gives the paper's. Reports the fraction of tokens at each bound where it binds.
    """
    losses = clipped_surrogate(
        t,
        t.sequence_ratio(anchor),
        t.advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
    )
    return t.segment_sum(t.advantages.new_ones(len(losses))) * losses
