"""One clipped ratio per sequence (GSPO, LUSPO, RLOO) or per turn, and the mean of clipped ratios (GMPO)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolkit.functional.options import AboveOne, Anchor, AverageAdvantages, ClipHigh, ClipLow, DualClip, NotNegative
from toolkit.functional.policy.clipped import clipped_surrogate
from toolkit.functional.policy.facts import SEQUENCE, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from toolkit.functional.terms import PolicyTerms


@register_policy_loss(
    "gspo",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A s, -A clip(s, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; s = exp(mean over the sequence of log(pi / pi_{anchor}))"
    "[, at most {delta} where it is not clipped][<?average_advantages>; A is the mean of the sequence's]",
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
    clip_ratio_c: DualClip | None = None,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
    average_advantages: AverageAdvantages = False,
) -> TokenLosses:
    """Clip the geometric mean of the probability ratios of a sequence.

    The loss is the same for all tokens of a sequence with one advantage. Reports the fraction of tokens at each bound
    where it binds.

    Args:
        cliprange_low: 3e-4 as in the paper, because s moves far less than r.
        cliprange_high: 4e-4 as in the paper.
        clip_ratio_c: none in the paper.
        delta: cap of s in the branch that is not clipped (`vanilla`); None: no cap.
    """
    advantages = t.segment_mean(t.advantages) if average_advantages else t.advantages
    return clipped_surrogate(
        t, t.sequence_ratio(anchor), advantages, cliprange_low, cliprange_high, clip_ratio_c, delta
    )


@register_policy_loss(
    "gspo_token",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A s_t, -A clip(s_t, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; s_t = sg(s) pi / sg(pi)[, at most {delta} where it is not clipped]; "
    "s = exp(mean over the sequence of log(pi / pi_{anchor}))",
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
    clip_ratio_c: DualClip | None = None,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Clip the sequence's ratio as GSPO does, but let each token's gradient carry its own advantage.

    It has the value of `gspo`; for advantages that differ from token to token. Reports the fraction of tokens at each
    bound where it binds.

    Args:
        cliprange_low: 3e-4 as in the paper.
        cliprange_high: 4e-4 as in the paper.
        clip_ratio_c: none in the paper.
        delta: cap of s_t in the branch that is not clipped (`vanilla`); None: no cap.
    """
    log_ratio = t.segment_mean(t.logprobs - t.anchor_logprobs(anchor)).detach()
    ratio = t.bounded(log_ratio + t.logprobs - t.logprobs.detach()).exp()
    return clipped_surrogate(t, ratio, t.advantages, cliprange_low, cliprange_high, clip_ratio_c, delta)


@register_policy_loss(
    "segment_ratio",
    scope="sequence",
    formula="max(-A u, -A clip(u, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most "
    "-{clip_ratio_c} A]; u = exp(mean over the turn of log(pi / pi_{anchor}))"
    "[, at most {delta} where it is not clipped]",
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
    clip_ratio_c: DualClip | None = None,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Clip the geometric mean of the probability ratios of a turn: GSPO for episodes of many turns.

    A turn is a run of scored tokens. Reports the fraction of tokens at each bound where it binds.

    Args:
        cliprange_low: 0.2 as in ROLL.
        cliprange_high: 0.2 as in ROLL.
        clip_ratio_c: 1.4 where ROLL turns it on.
        delta: cap of u in the branch that is not clipped (`vanilla`); None: no cap.
    """
    return clipped_surrogate(t, t.turn_ratio(anchor), t.advantages, cliprange_low, cliprange_high, clip_ratio_c, delta)


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
) -> TokenLosses:
    """Multiply GSPO's loss by the length of the sequence: no token of a long sequence counts less.

    Reports the fraction of tokens at each bound where it binds.

    Args:
        cliprange_low: 2e-3 as in TRL's documentation.
        cliprange_high: 2.5e-3 as in TRL's documentation.
    """
    losses = clipped_surrogate(t, t.sequence_ratio(anchor), t.advantages, cliprange_low, cliprange_high)
    return t.segment_sum(t.advantages.new_ones(len(losses))) * losses


@register_policy_loss(
    "rloo_sequence",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="max(-A R, -A clip(R, 1 - {cliprange_low}, 1 + {cliprange_high}))[, where A < 0 at most -{clip_ratio_c} A]"
    "; R = product over the sequence of pi / pi_{anchor}"
    "[, at most {delta} where it is not clipped]",
    facts=LossFacts(
        ratio=f"R, a product, {SEQUENCE}",
        gradient="-A R for each token; where the clip binds, the sequence has 0, which happens soon to long ones",
        source="Ahmadian et al. 2024, arXiv 2402.14740, with the clip of TRL's RLOOTrainer; the paper takes one "
        "step on-policy, where both are the same",
    ),
)
def rloo_sequence(
    t: PolicyTerms,
    *,
    cliprange_low: ClipLow = 0.2,
    cliprange_high: ClipHigh = 0.2,
    clip_ratio_c: DualClip | None = None,
    delta: AboveOne | None = None,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Clip the probability ratio of a completion: the completion is the action, as in RLOO.

    Unbiased, but R leaves the range after few steps where sequences are long; `gspo` takes the mean instead. Reports
    the fraction of tokens at each bound where it binds.

    Args:
        cliprange_low: 0.2 as in TRL.
        cliprange_high: 0.2 as in TRL.
        delta: cap of R in the branch that is not clipped (`vanilla`); None: no cap.
    """
    return clipped_surrogate(
        t, t.product_ratio(anchor), t.advantages, cliprange_low, cliprange_high, clip_ratio_c, delta
    )


@register_policy_loss(
    "gmpo",
    scope="sequence",
    aggregation="seq_mean_token_mean",
    formula="-mean(A) exp(mean over the sequence of x); x = log(pi / pi_{anchor}), at most {cliprange_high} where "
    "A > 0, at least -{cliprange_low} where A < 0",
    facts=LossFacts(
        ratio="log ratios are clipped on the side of A's sign; their mean carries the gradient",
        gradient="a clipped token has 0, the others of its sequence go on: -A (geometric mean) / n each",
        source="Zhao et al. 2025, arXiv 2507.20673",
        differs="Where advantages differ inside a sequence, as in verl: the sign is that of each token, the factor "
        "their mean, and a token with A = 0 counts as ratio 1",
    ),
)
def gmpo(
    t: PolicyTerms,
    *,
    cliprange_low: NotNegative = 0.4,
    cliprange_high: NotNegative = 0.4,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Maximise the geometric mean of a sequence's clipped ratios: one token of large ratio moves it less.

    Reports the fraction of tokens at each bound where it binds.

    Args:
        cliprange_low: floor of the log ratio where A < 0, negated; 0.4 as in the paper, in nats.
        cliprange_high: ceiling of the log ratio where A > 0; 0.4 as in the paper, in nats.
    """
    log_ratio = t.log_ratio(anchor)
    is_positive, is_negative = t.advantages > 0, t.advantages < 0
    t.report("clip_fraction_low", (log_ratio < -cliprange_low) & is_negative)
    t.report("clip_fraction_high", (log_ratio > cliprange_high) & is_positive)
    clipped = log_ratio.clamp(max=cliprange_high).where(is_positive, log_ratio.clamp(min=-cliprange_low))
    clipped = clipped.where(is_positive | is_negative, 0.0)
    return -t.segment_mean(t.advantages) * t.bounded(t.segment_mean(clipped)).exp()
