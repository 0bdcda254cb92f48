"""Masks by the change of a probability, not of a ratio: DPPO and IPO."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from annotated_types import DocInfo

from toolkit.functional.options import AboveOne, Anchor, NotNegative, SquareCoef
from toolkit.functional.policy.facts import WEIGHT_BOUND, LossFacts
from toolkit.functional.policy.registry import TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

    from toolkit.functional.terms import PolicyTerms

Form = Annotated[Literal["ratio", "score"], DocInfo('"ratio": -r A; "score": -sg(r) A log pi, as in verl')]
"""Both have the same gradient as long as r is not capped."""
Cap = Annotated[AboveOne, DocInfo('cap of the ratio, without gradient in "score" form; None: no cap; 20 in verl')]
SMALLEST_REST = 1e-8
"""Floor of 1 - p in a logarithm, as in verl: a token of probability 1 has no other tokens to compare."""
MASKED = "a mask looks at how far the probability itself moved"
DPPO = LossFacts(
    ratio="[<?form=score>r is a weight without gradient // r carries the gradient][, at most {clip_ratio_c}]; "
    + MASKED,
    gradient="0 for masked tokens[<?form=ratio> and where r > {clip_ratio_c}], "
    "else -[<?form=score>min(r, {clip_ratio_c}) // r] A grad log pi[<?log_ratio_sq_coef>, + that of (log r)^2]",
    bound=f"[<?form=score>{WEIGHT_BOUND}[<?log_ratio_sq_coef>; (log r)^2 has none outside] // "
    "{ratios}; the gradient is 0 outside]",
    source="DPPO, arXiv 2602.04879",
)


@register_policy_loss(
    "dppo_tv",
    formula="[<?form=score>-sg([min(r, {clip_ratio_c}) // r]) A log pi // -[min(r, {clip_ratio_c}) // r] A] "
    "unless (A > 0 and p - p_{anchor} > {threshold_high}) or (A <= 0 and p_{anchor} - p > {threshold_low}), then 0"
    "[<?log_ratio_sq_coef>; + {log_ratio_sq_coef} (log r)^2]; r = p / p_{anchor}",
    facts=DPPO,
)
def dppo_tv(
    t: PolicyTerms,
    *,
    threshold_low: NotNegative = 0.2,
    threshold_high: NotNegative = 0.2,
    form: Form = "ratio",
    clip_ratio_c: Cap | None = None,
    log_ratio_sq_coef: SquareCoef = 0.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Skip tokens whose probability already moved far in the direction of their advantage.

    A rare token may grow by a large ratio, a common one may not: PPO's range of the ratio does the opposite.
    |p - p_old| is the total variation of "this token or another". Reports the fraction of tokens skipped on each side.

    Args:
        threshold_low: largest fall of a probability where A <= 0; 0.2 as in verl and prime-rl.
        threshold_high: largest rise of a probability where A > 0; 0.2 as in verl and prime-rl.
        log_ratio_sq_coef: 1e-3 in prime-rl.
        anchor: "rollout" in prime-rl and SkyRL.
    """
    rise = t.logprobs.detach().exp() - t.anchor_logprobs(anchor).exp()
    is_high, is_low = (rise > threshold_high) & (t.advantages > 0), (-rise > threshold_low) & (t.advantages <= 0)
    return _masked(t, is_low, is_high, form, clip_ratio_c, log_ratio_sq_coef, anchor)


@register_policy_loss(
    "dppo_kl",
    formula="[<?form=score>-sg([min(r, {clip_ratio_c}) // r]) A log pi // -[min(r, {clip_ratio_c}) // r] A] "
    "unless (A > 0 and p > p_{anchor} and D > {threshold_high}) or (A <= 0 and p < p_{anchor} and "
    "D > {threshold_low}), then 0[<?log_ratio_sq_coef>; + {log_ratio_sq_coef} (log r)^2]; "
    "D = KL of (p_{anchor}, 1 - p_{anchor}) from (p, 1 - p); r = p / p_{anchor}",
    facts=replace(DPPO, differs="1 - p is held at 1e-8 and above"),
)
def dppo_kl(
    t: PolicyTerms,
    *,
    threshold_low: NotNegative = 0.05,
    threshold_high: NotNegative = 0.05,
    form: Form = "ratio",
    clip_ratio_c: Cap | None = None,
    log_ratio_sq_coef: SquareCoef = 0.0,
    anchor: Anchor = "old",
) -> TokenLosses:
    """Skip tokens whose probability moved far, measured by the divergence of "this token or another".

    ``D = p_old log(p_old / p) + (1 - p_old) log((1 - p_old) / (1 - p))``. Reports the fraction of tokens skipped on
    each side.

    Args:
        threshold_low: largest D of a fall where A <= 0, in nats.
        threshold_high: largest D of a rise where A > 0, in nats.
        anchor: "rollout" in SkyRL.
    """
    new, old = t.logprobs.detach(), t.anchor_logprobs(anchor)
    p, p_old = new.exp(), old.exp()
    rest, rest_old = (1 - p).clamp(min=SMALLEST_REST), (1 - p_old).clamp(min=SMALLEST_REST)
    divergence = p_old * (old - new) + (1 - p_old) * (rest_old.log() - rest.log())
    is_high = (divergence > threshold_high) & (p > p_old) & (t.advantages > 0)
    is_low = (divergence > threshold_low) & (p < p_old) & (t.advantages <= 0)
    return _masked(t, is_low, is_high, form, clip_ratio_c, log_ratio_sq_coef, anchor)


@register_policy_loss(
    "ipo",
    formula="-r A unless |p - p_{anchor}| > {threshold}, then 0"
    "[<?log_ratio_sq_coef>; + {log_ratio_sq_coef} (log r)^2]; r = p / p_{anchor}",
    facts=LossFacts(
        ratio=f"r carries the gradient and is not clipped; {MASKED}",
        gradient="of the first term 0 for masked tokens[<?log_ratio_sq_coef>; the squared log ratio holds on to "
        "all tokens]",
        source="prime-rl's ``ipo``",
    ),
)
def ipo(
    t: PolicyTerms,
    *,
    threshold: NotNegative = 0.1,
    log_ratio_sq_coef: SquareCoef = 1e-3,
    anchor: Anchor = "rollout",
) -> TokenLosses:
    """Skip tokens whose probability differs from the sampler's, whatever their advantage.

    Not the IPO of preference learning. Reports the fraction of tokens skipped on each side.

    Args:
        threshold: largest change of a probability; 0.1 as in prime-rl.
        log_ratio_sq_coef: 1e-3 as in prime-rl.
    """
    rise = t.logprobs.detach().exp() - t.anchor_logprobs(anchor).exp()
    return _masked(t, rise < -threshold, rise > threshold, "ratio", None, log_ratio_sq_coef, anchor)


def _masked(
    t: PolicyTerms,
    is_low: Tensor,
    is_high: Tensor,
    form: Form,
    clip_ratio_c: float | None,
    log_ratio_sq_coef: float,
    anchor: Anchor,
) -> Tensor:
    """Return -r A, 0 where the probability moved too far, plus the regulariser."""
    t.report("mask_fraction_low", is_low)
    t.report("mask_fraction_high", is_high)
    ratio = t.ratio(anchor) if clip_ratio_c is None else t.ratio(anchor).clamp(max=clip_ratio_c)
    weighted = ratio if form == "ratio" else ratio.detach() * t.logprobs
    losses = (-weighted * t.advantages).where(~(is_low | is_high), 0.0)
    # At 0 the term is skipped, so tokens without advantage keep a loss of exactly 0.
    return losses if log_ratio_sq_coef == 0 else losses + log_ratio_sq_coef * t.log_ratio(anchor).square()
